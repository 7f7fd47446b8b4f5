"""Look before you leap: what a promotion would apply, and what it would change.

render    print the objects of a model, without a cluster
diff      compare them with what is live, by a server-side dry run: nothing is changed.
          Exit status 0: the same, 1: it differs, 2: a mistake, the cluster can't be asked, or
          the answer can't be printed
platform  print what an admin applies once, for kubectl apply --server-side -f -
importer  print the Pod into which an admin of a cluster without a way out brings weights
"""

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
from typing import TextIO

import yaml

from catalog import CatalogError, ClusterSpec, ModelSpec, PoolError
from catalog.load import catalog
from k8s import manifests, records, slots, traffic
from k8s.client import Client, Obj, connect
from k8s.errors import KubernetesError
from k8s.manifests import Release, Slot
from k8s.manifests.engine import NODE_AND_IMAGE_SECONDS
from k8s.manifests.release import COMMIT, PROMOTION, UNKNOWN_COMMIT
from k8s.manifests.scaling import EXAMPLE_THRESHOLDS
from k8s.records import PromotionRecord

KINDS = ("Deployment", "PodDisruptionBudget", "Service", "ScaledObject")
# Not what is live: they are of one promotion.
RENDERED_KINDS = (*KINDS, "Job", "ConfigMap")
# The benchmark stage makes the real ones, from the catalog and the candidate's address.
EXAMPLE_PROFILE = '{"example": "the benchmark stage writes the load profile here"}'
EXAMPLE_BENCHMARK_SECONDS = 600
EXAMPLES = (
    "# Examples: thresholds (the benchmark gives them), minReplicaCount (the load does), "
    "the benchmark's profile and deadline."
)
CHOOSE = "Another cluster: --cluster NAME, or PROMOTION_CLUSTER."
PLACEHOLDER = re.compile(r"\S+@sha256:0{64}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        text, status = _run(args)
    except PoolError as error:
        _say(f"{error} {CHOOSE}")
        return 2
    except (CatalogError, KubernetesError) as error:
        _say(str(error))
        return 2
    except Exception:  # a fault of this program; Python's own status for it, 1, says "differs"
        _say(traceback.format_exc())
        return 2
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # who reads it (`head`, `less`) has seen enough
        _drop(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop(sys.stdout)
        _say(f"can't write all of it to standard output: {error.strerror}")
        return 2
    return status


def _say(message: str) -> None:
    """To a person, on stderr; where that can't be written, nobody wants to know."""
    try:
        print(message.rstrip("\n"), file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Let what is left in its buffer go nowhere: Python writes it at its end, and fails again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m k8s", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("render", "diff", "platform", "importer"):
        command = commands.add_parser(name)
        command.add_argument(
            "--cluster",
            default=os.environ.get("PROMOTION_CLUSTER", "lab"),
            help="in catalog/clusters (default: PROMOTION_CLUSTER, else lab)",
        )
        if name in ("platform", "importer"):
            continue
        command.add_argument("model", help="in catalog/models")
        default = "zeros" if name == "render" else "what is live, or zeros"
        command.add_argument("--commit", type=str.lower, help=f"40 hex digits (default: {default})")
        kinds = RENDERED_KINDS if name == "render" else KINDS
        command.add_argument("--kind", choices=kinds, help="this one only")
        if name == "render":
            command.add_argument("--slot", choices=("blue", "green"), default="blue")
    return parser


def _run(args: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit status."""
    cluster = catalog().cluster(args.cluster)
    if args.command == "platform":
        return f"# For cluster {cluster.name}. {CHOOSE}\n{to_yaml(manifests.platform(cluster))}", 0
    if args.command == "importer":
        text = to_yaml([manifests.importer(cluster)])
        _warn_of_placeholders(text, cluster)
        return f"# For cluster {cluster.name}. {CHOOSE}\n{text}", 0
    model = catalog().model(args.model)
    if args.commit is not None and not re.fullmatch(r"[0-9a-f]{40}", args.commit):
        raise CatalogError(f"--commit {args.commit!r}: write its 40 hex digits")
    if args.command == "render":
        release = _release(model, cluster, args.slot, args.commit)
        objects = _objects(release, None)
        objects += _weights_jobs(release)
        objects += manifests.benchmark_job(
            release, EXAMPLE_PROFILE, deadline_s=EXAMPLE_BENCHMARK_SECONDS
        )
        text = to_yaml([obj for obj in objects if args.kind in (None, obj["kind"])])
        _warn_of_placeholders(text, cluster)
        return f"# For cluster {cluster.name}. {CHOOSE}\n{EXAMPLES}\n{text}", 0
    client = connect(cluster)
    current, _ = records.read(client, model)
    slot: Slot = traffic.live_slot(client, model) or "blue"
    live = slots.deployment_of(client, model, slot)
    if current is None:
        _say("no record: the ScaledObject's thresholds are not known")
    objects = [
        obj
        for obj in _objects(_release(model, cluster, slot, args.commit, live, current), current)
        if args.kind in (None, obj["kind"]) and (current or obj["kind"] != "ScaledObject")
    ]
    if not objects:
        return "", 2
    text = difference(client, objects)
    return text, 1 if text else 0


def _warn_of_placeholders(text: str, cluster: ClusterSpec) -> None:
    """Say which images of what is printed are those of an example, which no registry has."""
    for image in sorted(set(PLACEHOLDER.findall(text))):
        _say(
            f"{image!r} is a placeholder; write your image's digest in "
            f"catalog/clusters/{cluster.name}.yaml (images), or the model's own as its image"
        )


def _release(
    model: ModelSpec,
    cluster: ClusterSpec,
    slot: Slot,
    commit: str | None,
    live: Obj | None = None,
    current: PromotionRecord | None = None,
) -> Release:
    """What the catalog says now; what only a promotion knows is taken from what is live."""
    known = slots.annotations(live) if live else {}
    served = {adapter.name: adapter for adapter in (current.adapters if current else ())}
    startup = model.rollout.start_seconds_min
    if live:
        startup = live["spec"]["progressDeadlineSeconds"] - NODE_AND_IMAGE_SECONDS
    return Release(
        model=model,
        cluster=cluster,
        commit=commit or known.get(COMMIT, UNKNOWN_COMMIT),
        slot=slot,
        promotion=known.get(PROMOTION, "none"),
        startup_seconds=max(1, startup),
        adapters=tuple(
            found if (found := served.get(new.name)) and found.repo == new.repo else new
            for new in manifests.unresolved(model)
        ),
    )


def _weights_jobs(release: Release) -> list[Obj]:
    """Resolve and download, of the model and of each adapter."""
    model, cluster, promotion = release.model, release.cluster, release.promotion
    out = [
        manifests.resolve_job(model, cluster, model.revision, promotion),
        manifests.download_job(model, cluster, release.commit, promotion),
    ]
    for adapter, served in zip(model.adapters, release.adapters, strict=True):
        out += [
            manifests.resolve_job(model, cluster, adapter.revision, promotion, adapter=adapter),
            manifests.adapter_job(
                model, cluster, adapter, served.commit, promotion, base=release.commit
            ),
        ]
    return out


def _objects(release: Release, current: PromotionRecord | None) -> list[Obj]:
    thresholds = current.thresholds if current else EXAMPLE_THRESHOLDS
    return [
        manifests.deployment(release),
        manifests.pdb(release),
        manifests.service(release.model, release.cluster, release.slot),
        manifests.scaled_object(release, thresholds, release.model.scaling.min_replicas),
    ]


def difference(client: Client, objects: list[Obj]) -> str:
    """Unified diff from what is live to what an apply would make of it; "" for none."""
    parts = []
    for obj in objects:
        name = f"{obj['kind']}/{obj['metadata']['name']}"
        live = client.find(obj["kind"], obj["metadata"]["name"])
        # As if forced: the question is what would change, not who may change it.
        after = client.apply(obj, dry_run=True, force=True)
        lines = difflib.unified_diff(
            _plain(live).splitlines(),
            _plain(after).splitlines(),
            f"live {name}",
            f"new {name}",
            lineterm="",
        )
        parts += [line + "\n" for line in lines]
    return "".join(parts)


def _plain(obj: Obj | None) -> str:
    """Without what the server writes of its own accord."""
    if obj is None:
        return ""
    meta = {
        key: value
        for key, value in obj["metadata"].items()
        if key in ("name", "namespace", "labels", "annotations")
    }
    if "annotations" in meta:
        # The revision is counted by the controller, when it gets to it.
        kept = {key: value for key, value in meta["annotations"].items() if key != slots.REVISION}
        meta["annotations"] = kept
    return to_yaml([{**obj, "metadata": meta, "status": None}])


class _Plain(yaml.SafeDumper):
    """Without anchors: kubectl reads them, people don't."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def to_yaml(objects: list[Obj]) -> str:
    """Documents as kubectl takes them."""
    return "".join(
        "---\n" + yaml.dump(obj, Dumper=_Plain, sort_keys=False, width=1000) for obj in objects
    )


if __name__ == "__main__":
    sys.exit(main())
