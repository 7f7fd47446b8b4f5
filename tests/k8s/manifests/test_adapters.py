"""LoRA adapters: served from the volume by their commits, fetched and compared by Jobs."""

import dataclasses

import pytest

from catalog.load import catalog
from k8s import manifests
from k8s.manifests import Release
from k8s.manifests.release import WEIGHTS, Obj, weights_key
from tests.k8s.manifests import rendered

LAB = catalog().cluster("lab")
MODEL = rendered.with_adapters()
RELEASE = rendered.release(MODEL, LAB)


def arguments(release: Release) -> list[str]:
    [container] = manifests.deployment(release)["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def command(job: Obj) -> list[str]:
    return list(job["spec"]["template"]["spec"]["containers"][0]["command"])


def test_the_engine_serves_them_by_name_from_their_commits() -> None:
    args = arguments(RELEASE)
    at = args.index("--lora-modules")
    assert args[at + 1 : at + 3] == [
        f"sql=/models/lab/smollm2-135m-lora/{'1' * 40}",
        f"legal.v2=/models/lab/smollm2-135m-lora/{'2' * 40}",
    ]
    assert "--enable-lora" in args
    # Ranks 4 and 20: the next one that vLLM takes.
    assert args[args.index("--max-lora-rank") + 1] == "32"
    assert args[args.index("--max-loras") + 1] == "2"
    assert args[at + 3 :] == list(MODEL.args), "the catalog's come last, so they may say otherwise"


@pytest.mark.parametrize(
    ("rank", "largest"), [(1, "8"), (8, "8"), (9, "16"), (257, "320"), (512, "512")]
)
def test_the_largest_rank_is_one_that_vllm_takes(rank: int, largest: str) -> None:
    adapters = tuple(dataclasses.replace(a, rank=rank) for a in RELEASE.adapters)
    args = arguments(dataclasses.replace(RELEASE, adapters=adapters))
    assert args[args.index("--max-lora-rank") + 1] == largest


def test_a_model_without_adapters_says_nothing_of_lora() -> None:
    args = arguments(rendered.release(catalog().model("smollm2-135m"), LAB))
    assert "lora" not in " ".join(args)


def test_another_revision_of_an_adapter_makes_other_pods() -> None:
    first, second = RELEASE.adapters
    other = dataclasses.replace(RELEASE, adapters=(first, dataclasses.replace(second, commit="f")))
    templates = [manifests.deployment(release)["spec"]["template"] for release in (RELEASE, other)]
    assert templates[0] != templates[1]


def test_a_release_without_its_adapters_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match=r"adapters \['sql'\] for smollm2-with-adapters"):
        dataclasses.replace(RELEASE, adapters=RELEASE.adapters[:1])


def test_jobs_resolve_and_fetch_each() -> None:
    [adapter, _] = MODEL.adapters
    job = manifests.resolve_job(MODEL, LAB, adapter.revision, "run-1", adapter=adapter)
    assert command(job)[3:] == ["resolve", "--repo", adapter.repo, "--revision", "main"]
    job = manifests.adapter_job(MODEL, LAB, adapter, "b" * 40, "run-1", base="a" * 40)
    assert command(job)[3:] == [
        *("fetch", "--repo", adapter.repo, "--commit", "b" * 40, "--root", "/models"),
        "--rehash-after-days=30",
        f"--adapter-of={MODEL.repo}@{'a' * 40}",
    ]
    assert job["metadata"]["labels"][WEIGHTS] == weights_key(adapter.repo, "b" * 40)
