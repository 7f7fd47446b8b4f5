"""An example's image is no image."""

from catalog.load import catalog

ZEROS = f"registry.example/x@sha256:{64 * '0'}"


def test_the_examples_ask_for_a_jobs_image() -> None:
    model = catalog().model("llama-3.1-8b-instruct")
    for name in ("eks-example", "gke-example"):
        told = catalog().cluster(name).placeholder(model)
        assert told.startswith(f"catalog/clusters/{name}.yaml: images.jobs: ")
        assert told.endswith("is a placeholder; write your image's digest")


def test_the_image_that_would_run_is_looked_at() -> None:
    lab = catalog().cluster("lab")
    model = catalog().model("smollm2-135m").model_copy(update={"image": ZEROS})
    assert lab.placeholder(model) == ""  # the lab has an engine of its own
    images = lab.images.model_copy(update={"engine": None})
    told = lab.model_copy(update={"images": images}).placeholder(model)
    assert told.startswith(f"catalog/models/smollm2-135m.yaml: image: {ZEROS!r} is a placeholder")
