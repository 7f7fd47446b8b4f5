"""A few completions kept in flight on a slot, so that its metrics have something to show."""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from k8s import pod_http, slots
from k8s.client import Client
from k8s.errors import HttpStatus, KubernetesError, PodUnreachable
from k8s.manifests import Release
from k8s.manifests.release import PORT

PROMPT = "Count upwards from one:"
PROMPT_ROOM = 64  # tokens left for it, whatever the tokeniser
# So many tokens that a request outlasts some scrapes. It is cut when the block ends.
MAX_TOKENS = 1024
NEXT_TOKEN_SECONDS = 60.0
AGAIN_SECONDS = 1.0
STOP_SECONDS = 5.0


class OwnRequests:
    """`count` requests, each sent again when it ends. `trouble`: what the last failure was."""

    def __init__(self, client: Client, release: Release, count: int) -> None:
        self.count = count
        self.trouble = ""
        self._client = client
        self._release = release
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        """Begin; returns at once."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Cut the requests: each at its next token, at the latest after NEXT_TOKEN_SECONDS."""
        self._over.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def _keep(self, number: int) -> None:
        # Not all at once: none is to wait for another.
        self._over.wait(number * AGAIN_SECONDS / self.count)
        while not self._over.is_set():
            try:
                pods = [
                    pod["metadata"]["name"]
                    for pod in slots.pods(self._client, self._release.model, self._release.slot)
                    if slots.is_ready(pod)
                ]
                if not pods:
                    raise PodUnreachable(f"no Pod of {self._release.name} is ready")
                self._complete(pods[number % len(pods)])
                self.trouble = ""
            except KubernetesError as error:
                self.trouble = str(error)
                self._over.wait(AGAIN_SECONDS)

    def _complete(self, pod: str) -> None:
        body = {
            "model": self._release.model.served_name,
            "prompt": PROMPT,
            "max_tokens": self._max_tokens(pod),
            "temperature": 0,
            "ignore_eos": True,
            # To notice the end of the block between two tokens; vLLM aborts what nobody reads.
            "stream": True,
        }
        head = {"Content-Type": "application/json"}
        with pod_http.pod_connection(
            self._client, pod, PORT, timeout_s=NEXT_TOKEN_SECONDS
        ) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body).encode(), head)
            answer = connection.getresponse()
            if answer.status >= 300:
                text = answer.read().decode("utf-8", "replace")
                raise HttpStatus(
                    f"POST /v1/completions of Pod {pod}: HTTP status {answer.status}: {text[:500]}",
                    code=answer.status,
                    body=text,
                )
            while answer.readline() and not self._over.is_set():
                pass

    def _max_tokens(self, pod: str) -> int:
        """As the context allows; where that isn't said, as in the benchmark's requests."""
        answer: Any = pod_http.get_json(
            self._client, pod, PORT, "/v1/models", timeout_s=NEXT_TOKEN_SECONDS
        )
        length = answer["data"][0].get("max_model_len")
        if length is None:
            return self._release.model.traffic.output_tokens.most
        return max(1, min(MAX_TOKENS, int(length) - PROMPT_ROOM))


@contextlib.contextmanager
def in_flight(client: Client, release: Release, count: int) -> Iterator[OwnRequests]:
    """`count` completions in flight on the slot's ready Pods, until the block ends.

    They are for the slot's metrics only: no failure of theirs is raised, see `trouble`.
    """
    requests = OwnRequests(client, release, count)
    requests.start()
    try:
        yield requests
    finally:
        requests.stop()
