"""vLLM's OpenAI API over the simulated batch."""

import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any, TextIO

from lab.engine.answers import TEMPLATE, answer_tokens, filler, prompt_tokens
from lab.engine.batch import Batch, Sequence
from lab.engine.http_server import Reply, Request
from lab.engine.metrics import Metrics
from lab.engine.settings import Flags, RequestFailure, Simulation

VERSION = "0.30.0+simulator"
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
ROUTES = {
    "/health": "GET",
    "/ping": "GET",
    "/version": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/tokenize": "POST",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
}


class BadRequest(Exception):
    """The request's body is wrong; the message says how."""


class Api:
    """Answers requests. `token_log`, if any, gets a line of JSON for each token written."""

    def __init__(
        self,
        flags: Flags,
        simulation: Simulation,
        max_model_len: int,
        batch: Batch,
        metrics: Metrics,
        token_log: TextIO | None,
    ) -> None:
        self.flags = flags
        self.simulation = simulation
        self.max_model_len = max_model_len
        self.batch = batch
        self.metrics = metrics
        self._token_log = token_log
        self._rng = random.Random(simulation.seed)
        self._ids = itertools.count()
        self._active: dict[int, Sequence] = {}
        self._created = int(time.time())

    async def handle(self, request: Request, reply: Reply) -> None:
        """One request."""
        method = ROUTES.get(request.path)
        if method is None:
            reply.send_error(404, f"Not Found: {request.path}", "NotFoundError")
        elif method != request.method:
            reply.send_error(405, "Method Not Allowed", "BadRequestError")
        elif request.path.startswith("/v1/") and not self._authorized(request):
            reply.send_json(401, {"error": "Unauthorized"})
        elif request.path == "/metrics":
            running, waiting = len(self.batch.running), len(self.batch.waiting)
            page = self.metrics.render(running, waiting, self.batch.kv_usage)
            reply.send(200, page.encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif request.path == "/version":
            reply.send_json(200, {"version": VERSION})
        elif request.path == "/v1/models":
            reply.send_json(200, {"object": "list", "data": self._models()})
        elif request.path in ("/health", "/ping"):
            reply.send(200, b"", "text/plain")
        else:
            try:
                if request.path == "/tokenize":
                    self._tokenize(request, reply)
                else:
                    await self._complete(request, reply)
            except BadRequest as error:
                reply.send_error(400, str(error), "BadRequestError")

    def abort_all(self) -> None:
        """Ends every request that is being answered."""
        for sequence in list(self._active.values()):
            self.batch.abort(sequence)

    def _authorized(self, request: Request) -> bool:
        key = self.flags.api_key
        return key is None or request.headers.get("authorization") == f"Bearer {key}"

    def _models(self) -> list[dict[str, Any]]:
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": str(self.flags.model),
                "parent": None,
                "max_model_len": self.max_model_len,
                "simulated": True,
            }
            for name in self.flags.served_names
        ] + [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": str(path),
                "parent": self.flags.served_names[0],
                "max_model_len": None,
                "simulated": True,
            }
            for name, path in self.flags.lora_modules.items()
        ]

    def _tokenize(self, request: Request, reply: Reply) -> None:
        body = _json(request.body)
        prompt, _ = _chat_prompt(body) if "messages" in body else _plain_prompt(body)
        tokens = list(range(len(prompt)))
        count = {"count": len(prompt), "max_model_len": self.max_model_len, "tokens": tokens}
        reply.send_json(200, count)

    async def _complete(self, request: Request, reply: Reply) -> None:
        self.metrics.posts += 1
        number = next(self._ids)
        body = _json(request.body)
        chat = request.path == "/v1/chat/completions"
        model = body.get("model") or self.flags.served_names[0]
        if model not in self.flags.served_names and model not in self.flags.lora_modules:
            message = f"The model `{model}` does not exist."
            reply.send_error(404, message, "NotFoundError")
            return
        prompt, text = _chat_prompt(body) if chat else _plain_prompt(body)
        max_tokens = self._max_tokens(body, len(prompt), chat)
        fault = self._fault()
        queued = len(self.batch.waiting) + len(self.batch.running)
        limit = self.flags.max_num_queued_reqs
        if fault == "status_503" or (limit is not None and queued >= limit):
            reply.send_error(503, "The server is overloaded (simulated).", "ServiceUnavailable")
            return
        answer = Answer(
            name=request.headers.get("x-request-id") or f"simulated-{number}",
            model=model,
            chat=chat,
            body=body,
            prompt_length=len(prompt),
            style=self.simulation.answers,
            fault=fault,
            reply=reply,
            token_log=self._token_log,
        )
        style: str = self.simulation.answers
        if style == "random_unless_temperature_0":
            style = "random" if body.get("temperature") != 0 else "known"
        said = answer_tokens(text, style, self._rng)
        if model in self.flags.lora_modules:
            said.insert(1, f" [{model}]")  # a simulated adapter changes nothing else
            prompt = [f"{model} {token}" for token in prompt]  # shares no prefix with the model's
        tokens = iter(said)
        if body.get("ignore_eos"):
            tokens = itertools.chain(tokens, filler())
        if fault == "only_done":
            answer.only_done()
            return
        await asyncio.sleep(self.simulation.service_curve.ttft_base_ms / 1e3)
        sequence = Sequence(prompt, tokens, max_tokens, answer.take)
        self._active[number] = sequence
        try:
            self.batch.submit(sequence)
            await sequence.done.wait()
        finally:
            del self._active[number]
        await answer.finish(sequence)

    def _max_tokens(self, body: dict[str, Any], prompt_length: int, chat: bool) -> int:
        left = self.max_model_len - prompt_length
        most = left if chat else DEFAULT_COMPLETION_TOKENS
        for name in ("max_tokens", "max_completion_tokens"):
            most = most if body.get(name) is None else body[name]
        if not isinstance(most, int) or most < 1:
            raise BadRequest(f"max_tokens must be at least 1, got {most}.")
        if most > left:
            raise BadRequest(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"you requested {most} output tokens and your prompt contains {prompt_length} "
                "input tokens. Please reduce the length."
            )
        return most

    def _fault(self) -> RequestFailure | str | None:
        drawn = self._rng.random()
        for failure in self.simulation.requests:
            if drawn < failure.share:
                return failure if failure.kind == "stall" else failure.kind
            drawn -= failure.share
        return None


class Answer:
    """Turns the tokens of one sequence into a response, streamed or whole."""

    def __init__(
        self,
        *,
        name: str,
        model: str,
        chat: bool,
        body: dict[str, Any],
        prompt_length: int,
        style: str,
        fault: RequestFailure | str | None,
        reply: Reply,
        token_log: TextIO | None,
    ) -> None:
        options = body.get("stream_options") or {}
        self._name = name
        self._chat = chat
        self._stream = bool(body.get("stream"))
        self._usage_last = bool(options.get("include_usage")) and fault != "no_usage"
        self._usage_always = self._usage_last and bool(options.get("continuous_usage_stats"))
        self._prompt_length = prompt_length
        self._style = style
        self._fault = fault
        self._reply = reply
        self._token_log = token_log
        self._tokens: list[str] = []
        self._cut_at = max(1, (body.get("max_tokens") or 16) // 2)
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": f"{kind}.chunk" if chat and self._stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def take(self, token: str, reason: str | None) -> bool:
        """One more token; False when the client has gone."""
        if self._reply.gone:
            return False
        index = len(self._tokens)
        self._tokens.append(token)
        if not self._stream:
            return True
        if self._fault == "close_early" and index >= self._cut_at:
            self._reply.cut()
            return False
        if self._fault == "error_event" and index >= self._cut_at:
            return True
        if self._chat and index == 0:
            self._event([self._choice({"role": "assistant", "content": ""}, None)], 0)
        now = time.perf_counter_ns()
        self._event([self._choice(self._delta(token), reason)], len(self._tokens))
        if self._token_log:
            print(json.dumps({"id": self._name, "token": index, "ns": now}), file=self._token_log)
        return True

    async def finish(self, sequence: Sequence) -> None:
        """After the last token."""
        reason = sequence.finish_reason
        if self._reply.gone:
            return
        if reason == "abort":
            self._reply.cut()
        elif not self._stream:
            self._reply.send_json(200, self._whole(reason))
        else:
            if isinstance(self._fault, RequestFailure):
                await asyncio.sleep(self._fault.seconds)
            if self._fault == "error_event":
                error = {"message": "EngineCore encountered an issue (simulated)", "code": 500}
                self._reply.event(json.dumps({"error": error}).encode())
            if self._usage_last:
                self._event([], len(self._tokens))
            if self._fault != "no_done":
                self._reply.event(b"[DONE]")
            self._reply.end()

    def only_done(self) -> None:
        """An answer without any token, as if it were one."""
        self._reply.event(b"[DONE]")
        self._reply.end()

    def _event(self, choices: list[dict[str, Any]], tokens: int) -> None:
        event = {**self._head, "choices": choices}
        if self._usage_always or not choices:
            event["usage"] = self._usage(tokens)
        self._reply.event(json.dumps(event, separators=(",", ":")).encode())

    def _choice(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        return choice | ({"delta": delta} if self._chat else {"text": delta["content"]})

    def _delta(self, token: str) -> dict[str, Any]:
        if self._style == "null":
            return {"content": None}
        if self._style == "reasoning" and self._chat:
            return {"reasoning": token}
        return {"content": token}

    def _whole(self, reason: str | None) -> dict[str, Any]:
        text: str | None = "".join(self._tokens)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._style == "null":
            text, message["content"] = None, None
        elif self._style == "reasoning":
            message |= {"content": None, "reasoning": text}
        said = {"message": message} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "choices": [choice], "usage": self._usage(len(self._tokens))}

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_length,
            "total_tokens": self._prompt_length + tokens,
            "completion_tokens": tokens,
        }


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"Invalid JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object.")
    return data


def _chat_prompt(body: dict[str, Any]) -> tuple[list[str], str]:
    """Prompt tokens and the last message's text."""
    try:
        texts = [_content(message["content"]) for message in body["messages"]]
        return [*TEMPLATE, *prompt_tokens(" ".join(texts))], texts[-1]
    except (KeyError, TypeError, IndexError):
        raise BadRequest("messages must be a list of role and content.") from None


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def _plain_prompt(body: dict[str, Any]) -> tuple[list[str], str]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt_tokens(prompt) or [prompt], prompt
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return [str(token) for token in prompt], ""
    raise BadRequest("prompt must be a text or a list of token ids, and not empty.")


def open_token_log(path: Path | None) -> TextIO | None:
    """The token log, fully buffered: it must not delay tokens."""
    return path.open("w", buffering=1 << 20) if path else None
