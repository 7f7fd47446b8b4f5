"""How long an engine may take to start."""

import pytest

from assets.vllm_deployment import startup_seconds
from catalog.model import RolloutPolicy

POLICY = RolloutPolicy(start_seconds_min=60, start_seconds_max=3600)


@pytest.mark.parametrize(
    ("size", "throughput", "seconds"),
    [
        (int(16e9), 100e6, 480),  # 160 s to read, three times that
        (int(0.3e9), 2e9, 60),  # never less than the catalog's minimum
        (int(894e9), 350e6, 3600),  # kserve#5062: 43 min from EFS, capped by the catalog
        (int(1e9), 0.0, 3600),  # never measured
    ],
)
def test_the_budget_follows_bytes_and_throughput(
    size: int, throughput: float, seconds: int
) -> None:
    assert startup_seconds(POLICY, size, throughput) == seconds
