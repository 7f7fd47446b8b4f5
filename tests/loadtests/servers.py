"""Servers for the tests: the engine simulator as a process, and a stub that sends raw bytes."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAST = {"ttft_base_ms": 5, "decode_ms_per_step": 4, "decode_ms_per_sequence": 0.1}
FAST |= {"prefill_ms_per_token": 0.01, "max_num_seqs": 64}


def make_model(folder: Path, simulation: dict[str, Any] | None = None) -> Path:
    """A folder with one small tensor, loadable by the simulator."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = {"a": {"dtype": "F16", "shape": [1000], "data_offsets": [0, 2000]}}
    header = json.dumps(tensor).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(2000)
    (folder / "model.safetensors").write_bytes(data)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    if simulation is not None:
        (folder / "simulator.json").write_text(json.dumps(simulation))
    return folder


class Simulator:
    """A running engine simulator."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: list[str]) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def stop(self, wait_s: float = 10) -> int:
        """SIGTERM, then its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(wait_s)


@contextmanager
def simulator(folder: Path, *flags: str, simulation: dict[str, Any]) -> Iterator[Simulator]:
    """Runs the engine simulator on a free port until the block ends."""
    make_model(folder, simulation)
    command = [sys.executable, "-m", "lab.engine", str(folder), "--served-model-name", "m"]
    command += ["--port", "0", "--host", "127.0.0.1", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    log = []
    try:
        port = 0
        for line in process.stdout:
            log.append(line)
            if found := re.search(r"on http://127.0.0.1:(\d+)", line):
                port = int(found[1])
            if "startup complete" in line:
                break
        assert port, "".join(log)
        yield Simulator(process, port, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run_program(*arguments: str, timeout_s: float = 40) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments, in the repository, its output captured."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def chunked(data: bytes) -> bytes:
    """One chunk of HTTP's chunked coding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


Script = Callable[[socket.socket, int], None]


class Stub:
    """Answers /metrics, /version, /tokenize and /v1/models like an engine, and each POST for a
    completion by `script`, which gets the socket and the number of the POST, and writes the raw
    response."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.template = 0
        self.posts = 0
        self.bodies: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # or accept() would keep it open
        self._socket.close()

    def count(self, body: bytes) -> int:
        """Tokens of a prompt: its words, and the template of a chat."""
        fields = json.loads(body)
        text: str = fields.get("prompt") or fields["messages"][0]["content"]
        return len(text.split()) + self.template

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader = connection.makefile("rb")
        try:
            while line := reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while (header := reader.readline().strip()) != b"":
                    name, _, value = header.partition(b":")
                    headers[name.lower()] = value.strip()
                body = reader.read(int(headers.get(b"content-length", 0)))
                if path.startswith("/v1/") and body:
                    self._post(connection, json.loads(body))
                elif path == "/tokenize":
                    connection.sendall(_whole(json.dumps({"count": self.count(body)}).encode()))
                else:
                    connection.sendall(_get(path))
        except OSError:
            pass
        finally:
            reader.close()
            connection.close()

    def _post(self, connection: socket.socket, body: dict[str, Any]) -> None:
        with self._lock:
            number, self.posts = self.posts, self.posts + 1
            self.bodies.append(body)
        self.script(connection, number)


def _get(path: str) -> bytes:
    if path == "/v1/models":
        entry = {"id": "m", "root": "/models/m", "max_model_len": 4096}
        return _whole(json.dumps({"data": [entry]}).encode())
    if path == "/version":
        return _whole(b'{"version": "0.0.stub"}')
    return _whole(b'vllm:num_requests_running{model_name="m",engine="0"} 1.0\n')


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until the condition holds; fails after so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
