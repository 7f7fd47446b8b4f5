"""The outage of `recreate`, as it is announced."""

from assets.gpu_nodes import PODS_COME_AND_GO_S, outage_seconds
from catalog.load import catalog
from tests.assets.test_ttft_benchmark import record


def test_the_outage_is_a_start_like_the_last_one_and_the_whole_load() -> None:
    model = catalog().model("llama-3.1-8b-instruct")
    steps = len({*model.traffic.rates, model.slo.required_rate})
    least = steps * (model.traffic.step_seconds + model.traffic.warmup_seconds)
    current = record({}).model_copy(update={"seconds_to_ready": 100.0})
    known = outage_seconds(model, current)
    assert known >= 100.0 + least + PODS_COME_AND_GO_S
    assert outage_seconds(model, None) - known == model.rollout.start_seconds_min - 100.0
