"""Runs the stand-in's jobs one after the other, and tells how they go: over a websocket, or by a status to poll."""

import asyncio
import io
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remote.channel import Channel, strikes
from remote.executor import WorkerDied
from remote.faults import (
    Altered,
    ByAddress,
    DownloadFails,
    Garbage,
    OutOfMemory,
    ServerSays,
    ShutDown,
    Silent,
    Slow,
    model_unavailable,
    too_long,
    worker_killed,
)
from remote.records import Record
from remote.work import Job, Memory, Outcome

if TYPE_CHECKING:
    from remote.standin import Standin

_NONSENSE = b"\x07nonsense"
_SHORTFALL = 1024**3


class Silenced(Exception):
    """The client of a job is to hear no more of it, and the job stops."""


def status_message(record: Record, status: str, text: str, **fields: Any) -> str:
    """A status as it goes over the wire."""
    from nnsight.schema.response import ResponseModel, Status

    message = ResponseModel(id=record.job_id, status=Status(status), description=text, **fields)
    return str(message.model_dump_json())


class JobRunner:
    """Takes requests through their statuses, in the order in which they came."""

    def __init__(self, standin: "Standin") -> None:
        self._standin = standin
        self._turn = asyncio.Lock()

    async def run(self, record: Record, envelope: dict[str, Any], payload: bytes, channel: Channel | None) -> None:
        """Take one request from QUEUED to its end."""
        tell = _Teller(record, channel, self._standin.statuses)
        with self._standin.working():
            try:
                await tell("QUEUED", "Added to Queue at position 1.")
                async with self._turn:
                    outcome = await self._execute(record, envelope, payload, tell)
                    await self._end(record, outcome, envelope["compress"], tell)
            except Silenced:
                return
            except Exception:  # else a mistake in a test's fault would leave its client waiting
                await tell("ERROR", f"The stand-in itself failed.\n{traceback.format_exc()}")

    async def _execute(
        self, record: Record, envelope: dict[str, Any], payload: bytes, tell: "_Teller"
    ) -> Outcome | ServerSays:
        fault, executor = record.fault, self._standin.executor
        if envelope["model_key"] != self._standin.model_key:
            return model_unavailable(f"Repository Not Found: {envelope['model_key']}")
        await tell("DISPATCHED", "Your job has been sent to the model deployment.")
        if isinstance(fault, ServerSays):
            return fault
        await tell("RUNNING", "Your job has started running.")
        loop = asyncio.get_running_loop()
        job = Job(payload, envelope["compress"], envelope["env"], _memory(fault))

        def log(line: str) -> None:
            asyncio.run_coroutine_threadsafe(tell.log(line), loop).result(10)

        try:
            return await asyncio.to_thread(executor.run, job, log)
        except WorkerDied:
            return worker_killed()
        except TimeoutError:
            return too_long(executor.job_seconds)

    async def _end(self, record: Record, outcome: Outcome | ServerSays, compress: bool, tell: "_Teller") -> None:
        if isinstance(outcome, ServerSays):
            return await tell("ERROR", outcome.text, meta=outcome.meta)
        work = outcome.work
        record.layers = tuple(sorted(work.layers))
        record.layer_calls = sum(work.layers.values())
        record.forwards = work.forwards
        record.tokens = max(work.tokens.values(), default=0)
        if outcome.result is None:
            return await tell("ERROR", outcome.error or "", meta=_meta(outcome))
        fault, result = record.fault, outcome.result
        if isinstance(fault, Altered):
            result = _altered(result, fault.change, compress)
        elif isinstance(fault, Garbage) and fault.of != "frame":
            result = _NONSENSE if fault.of == "result" else result[: len(result) // 2]
        record.bytes_out = len(result)
        by_address = isinstance(fault, ByAddress | DownloadFails) or len(result) > self._standin.inline_bytes
        if record.blocking and not by_address:
            return await tell.completed(result, _meta(outcome))
        self._standin.results[record.job_id] = result
        elsewhere = fault.address if isinstance(fault, ByAddress) else None
        await tell.completed(elsewhere or f"{self._standin.url}/results/{record.job_id}.pt", _meta(outcome))


class _Teller:
    """Tells one client how its job goes."""

    def __init__(self, record: Record, channel: Channel | None, statuses: dict[str, str]) -> None:
        self._record = record
        self._channel = channel
        self._statuses = statuses

    async def __call__(self, status: str, text: str, **fields: Any) -> None:
        await self._reach(status)
        await self._send(status_message(self._record, status, text, **fields))

    async def log(self, line: str) -> None:
        """Pass on a printed line; who polls does not get to see it."""
        if self._channel is not None:
            await self._channel.send(status_message(self._record, "LOG", line))

    async def completed(self, data: bytes | str, meta: dict[str, Any]) -> None:
        """End the job with its result (bytes), or with the address of it."""
        from nnsight.schema.response import ResponseModel, Status

        await self._reach("COMPLETED")
        text, fault = "Your job has been completed.", self._record.fault
        if isinstance(fault, Garbage) and fault.of == "frame":
            await self._send(_NONSENSE if self._channel is not None else _NONSENSE.decode())
        elif isinstance(data, str):
            await self._send(status_message(self._record, "COMPLETED", text, data=data, meta=meta))
        else:
            response = ResponseModel(
                id=self._record.job_id, status=Status.COMPLETED, description=text, data=data, meta=meta
            )
            await self._send(response.pickle())

    async def _reach(self, status: str) -> None:
        fault = self._record.fault
        self._record.status = status
        if self._channel is not None:
            await self._channel.strike(fault, status)
        elif isinstance(fault, Slow) and strikes(fault, status):
            await asyncio.sleep(fault.seconds)
        if isinstance(fault, Silent | ShutDown) and strikes(fault, status):
            raise Silenced

    async def _send(self, message: str | bytes) -> None:
        if self._record.blocking:
            if self._channel is not None:
                await self._channel.send(message)
        else:
            assert isinstance(message, str)
            self._statuses[self._record.job_id] = message


def _memory(fault: object) -> Memory | None:
    if not isinstance(fault, OutOfMemory):
        return None
    bounded = fault.above_layers is not None or fault.above_tokens is not None
    return Memory(fault.above_layers if bounded else 0, fault.above_tokens, fault.device)


def _meta(outcome: Outcome) -> dict[str, Any]:
    """What the real server reports of a run on a CPU; its shortfall is absent unless CUDA was out of memory."""
    none: dict[str, Any] = {"max_memory_usage": 0, "max_mem_by_gpu": {}, "max_mem_pct_by_gpu": {}}
    shortfall = {"alloc_shortfall_by_gpu": {"0": _SHORTFALL}} if outcome.out_of_cuda else {}
    return {"runtime": round(outcome.runtime, 4), **none, **shortfall}


def _altered(result: bytes, change: Callable[[dict[str, Any]], dict[str, Any]], compress: bool) -> bytes:
    import torch
    import zstandard

    data = zstandard.ZstdDecompressor().decompress(result) if compress else result
    buffer = io.BytesIO()
    torch.save(change(torch.load(io.BytesIO(data), weights_only=False)), buffer)
    return zstandard.ZstdCompressor(level=3).compress(buffer.getvalue()) if compress else buffer.getvalue()
