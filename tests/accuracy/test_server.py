"""The reference server answers and logs; its times are not judged here."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.accuracy.scenarios import SCENARIOS
from tests.accuracy.score import read_truth
from tests.loadtests.servers import ROOT


@pytest.mark.parametrize("name", ["fixed", "reasoning_first", "split"])
def test_what_was_written_is_in_the_log(tmp_path: Path, name: str) -> None:
    log = tmp_path / "truth.json"
    command = [sys.executable, "-m", "tests.accuracy.server", "--scenario", name]
    server = subprocess.Popen(
        [*command, "--log", str(log)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/v1/models", timeout=20) as page:
            assert json.load(page)["data"][0]["id"] == "reference"
        chat = SCENARIOS[name].chat
        fields = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        request = urllib.request.Request(
            f"{url}/v1/{'chat/' if chat else ''}completions",
            json.dumps({"model": "reference", **fields}).encode(),
            {"X-Request-Id": "r1", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            events = answer.read().decode().split("\n\n")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        server.stdout.close()
    assert events[-2] == "data: [DONE]"
    (truth,) = read_truth(json.loads(log.read_text()))
    assert (truth.id, truth.prompt, truth.fault) == ("r1", "hi", "")
    assert sum(count for _, count in truth.tokens) == 32
    # Never before its time, but for what the two clocks may be apart.
    assert truth.ttft_ms > 199
    assert (truth.tokens[-1][0] - truth.arrived) / 1e6 > 200 + 31 * 20 - 1
