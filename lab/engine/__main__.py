"""`python -m lab.engine <model folder> --served-model-name X --port 8000 …`: as `vllm serve`.

Exit status: 0 after SIGTERM, 1 if the model can't be loaded or a planned failure says so, 2 for
an unknown flag.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

from lab.engine.api import VERSION, Api, open_token_log
from lab.engine.batch import Batch
from lab.engine.http_server import Server
from lab.engine.metrics import Metrics
from lab.engine.model_files import (
    ModelError,
    ModelFiles,
    inspect_adapter,
    inspect_model,
    read_through,
)
from lab.engine.settings import (
    Failure,
    Flags,
    SettingsError,
    Simulation,
    load_simulation,
    parse_flags,
)


def log(message: str, level: str = "INFO", process: str = "APIServer") -> None:
    """A log line like vLLM's, marked as the simulator's."""
    now = time.strftime("%m-%d %H:%M:%S")
    print(f"({process} pid={os.getpid()}) {level} {now} [simulator] {message}", flush=True)


def main() -> int:
    """Starts the engine simulator; returns the exit status."""
    flags = parse_flags(None)
    log(f"vLLM API server version {VERSION} (engine simulator: no model runs here)")
    try:
        simulation = load_simulation(flags.model)
        model = inspect_model(flags.model)
        _check_adapters(flags)
        max_model_len = _max_model_len(flags, model)
    except (ModelError, SettingsError) as error:
        log(str(error), "ERROR")
        return 1
    return asyncio.run(_serve(flags, simulation, model, max_model_len))


def _check_adapters(flags: Flags) -> None:
    if flags.lora_modules and not flags.enable_lora:
        raise ModelError("RuntimeError: LoRA is not enabled. Use --enable-lora to enable LoRA.")
    for name, folder in flags.lora_modules.items():
        inspect_adapter(name, folder, flags.max_lora_rank)
        log(f"Loaded new LoRA adapter: name '{name}', path '{folder}'")


def _max_model_len(flags: Flags, model: ModelFiles) -> int:
    longest = model.max_position_embeddings
    if flags.max_model_len is not None and flags.max_model_len > longest:
        raise ModelError(
            f"ValueError: User-specified max_model_len ({flags.max_model_len}) is greater than "
            f"the derived max_model_len (max_position_embeddings={longest})"
        )
    return flags.max_model_len or longest


async def _serve(
    flags: Flags, simulation: Simulation, model: ModelFiles, max_model_len: int
) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    fail = simulation.fail
    if fail and fail.when == "start":
        if await _stopped(stopping, fail.after_s):
            return 0
        return await _fail(fail, stopping)
    if await _stopped_while(stopping, _load(flags, simulation, model)):
        return 0

    curve = simulation.service_curve
    metrics = Metrics(flags.served_names[0])
    batch = Batch(curve, flags.max_num_seqs or curve.max_num_seqs, metrics, flags.prefix_caching)
    token_log = open_token_log(flags.token_log)
    api = Api(flags, simulation, max_model_len, batch, metrics, token_log)
    server = Server(api.handle)
    try:
        port = await server.listen(flags.host, flags.port)
    except OSError as error:
        log(f"OSError: {error}", "ERROR")
        return 1
    steps = asyncio.create_task(batch.run())
    log(f"Starting vLLM API server (simulator) on http://{flags.host}:{port}")
    log("Application startup complete.")
    try:
        if fail and not await _stopped(stopping, fail.after_s):
            batch.hung = True
            return await _fail(fail, stopping)
        await stopping.wait()
        log(f"Shutting down, waiting {flags.shutdown_timeout_s:g} s for requests in flight.")
        if not await server.drain(flags.shutdown_timeout_s):
            log("Requests in flight are aborted.", "WARNING")
            api.abort_all()
            await asyncio.sleep(0.05)
        return 0
    finally:
        steps.cancel()
        if token_log:
            token_log.close()


async def _load(flags: Flags, simulation: Simulation, model: ModelFiles) -> None:
    """Reads the weights and takes as long as they are large."""
    log(
        f"Starting to load {model.architecture} from {flags.model}: {model.tensors} tensors, "
        f"{model.bytes / 2**20:.0f} MiB, tensor parallel {flags.tensor_parallel_size}",
        process="EngineCore",
    )
    started = time.monotonic()
    await asyncio.to_thread(read_through, flags.model)
    wanted = model.bytes / simulation.service_curve.load_bytes_per_s
    await asyncio.sleep(max(0.0, wanted - (time.monotonic() - started)))
    seconds = time.monotonic() - started
    log(f"Loading weights took {seconds:.2f} seconds (simulated)", process="EngineCore")


async def _fail(fail: Failure, stopping: asyncio.Event) -> int:
    """The planned failure of the whole engine."""
    log(fail.log, "ERROR", "EngineCore")
    if fail.kind == "exit":
        return fail.code
    await stopping.wait()
    return 0


async def _stopped(stopping: asyncio.Event, seconds: float) -> bool:
    """Waits so long; True if the engine was told to stop meanwhile."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)
    return stopping.is_set()


async def _stopped_while(stopping: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work; True if the engine was told to stop before it was done."""
    task = asyncio.create_task(work)
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if stopping.is_set():
        task.cancel()
        return True
    await task
    return False


if __name__ == "__main__":
    sys.exit(main())
