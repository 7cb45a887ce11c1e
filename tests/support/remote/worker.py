"""The stand-in's executor: a process of its own that holds one model and runs what clients send, with nnsight itself.

A process, as on the real server: nnsight keeps the source of traced blocks in caches of the process, and a client's own
packages must be out of reach here, so that what a request needs, it must bring. Started by `executor`, which speaks to
it through a pipe. Nothing of HTTP is known here.
"""

import contextlib
import io
import itertools
import linecache
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from multiprocessing.connection import Connection
from typing import Any

from remote.work import Job, Memory, Outcome, Work

ABSENT = ("tl_persona", "transformer_lens", "jaxtyping", "beartype", "tiny", "remote", "conftest", "oracle")
"""What a server does not have: the client's package, what only that package needs, and the modules of its tests."""

_GIB = 1024**3


class _Absent(MetaPathFinder):
    """Makes some packages look uninstalled."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


class Host:
    """A model that runs requests one after the other."""

    def __init__(self, folder: str) -> None:
        import torch
        import transformers
        from nnsight.modeling.transformers import TransformersModel
        from transformers import AutoTokenizer

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = TransformersModel(
            folder, task="text-generation", tokenizer=tokenizer, dispatch=True, dtype=torch.float32
        )
        self.model._module.requires_grad_(False)
        self.memory: Memory | None = None
        self.work = Work()
        self._count(self.model._module)

    def _count(self, module: Any) -> None:
        """Watch the model and its layers: the first submodule of a layer runs only when the layer does."""
        import torch

        n_layers = module.config.num_hidden_layers
        stacks = (part for part in module.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers)
        for index, layer in enumerate(next(stacks)):
            first = next(layer.children())
            first.register_forward_pre_hook(self._layer_hook(index), with_kwargs=True)
        module.register_forward_pre_hook(self._forward_hook)

    def _forward_hook(self, _module: Any, _inputs: Any) -> None:
        self.work.forwards += 1

    def _layer_hook(self, index: int) -> Any:
        import torch

        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            stream = next(value for value in itertools.chain(inputs, named.values()) if torch.is_tensor(value))
            work = self.work
            work.layers[index] = work.layers.get(index, 0) + 1
            work.tokens[index] = work.tokens.get(index, 0) + stream.shape[:-1].numel()
            self._allocate()

        return hook

    def _allocate(self) -> None:
        """Raise what an allocator raises, where the layers and tokens of this request are too many."""
        import torch

        memory = self.memory
        if memory is None:
            return
        fits_layers = memory.layers is None or len(self.work.layers) <= memory.layers
        fits_tokens = memory.tokens is None or max(self.work.tokens.values()) <= memory.tokens
        if fits_layers and fits_tokens:
            return
        if memory.device == "cpu":
            wanted = f"you tried to allocate {2 * _GIB} bytes. Error code 12 (Cannot allocate memory)"
            raise RuntimeError(
                f"[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: {wanted}"
            )
        room = "GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {room}")

    def run(self, job: Job) -> Outcome:
        """Run one request. Whatever it raises is its outcome."""
        self.memory, self.work = job.memory, Work()
        started = time.perf_counter()
        try:
            with _own_sources():
                result = self._result(job)
        except Exception as error:
            text = _text_of(error)
            return Outcome(self.work, time.perf_counter() - started, None, text, "CUDA out of memory" in str(error))
        finally:
            self.model.interleaver.cancel()
        return Outcome(self.work, time.perf_counter() - started, result)

    def _result(self, job: Job) -> bytes:
        import torch
        import zstandard
        from nnsight.tracing.tracer import _saves, dec, inc

        self.model._remoteable_set_env(job.env)
        tracer = _tracer(job, self.model._remoteable_persistent_objects())
        inc()
        try:
            tracer.execute(tracer.info.code)
            kept = _saves()
            saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in kept}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = buffer.getvalue()
        return zstandard.ZstdCompressor(level=3).compress(data) if job.compress else data


class _Refused(Exception):
    """A request that cannot be read; its text alone goes back."""


def _tracer(job: Job, known: dict[str, Any]) -> Any:
    from nnsight.intervention.serialization import UnknownPersistentIdError
    from nnsight.schema.request import RequestModel

    try:
        return RequestModel.deserialize(job.payload, known, compress=job.compress)
    except UnknownPersistentIdError as error:
        raise _Refused(
            "The model architecture on this server doesn't match the one your code was traced against: "
            f"it has no module at '{error}'."
        ) from error
    except Exception as error:
        raise _Refused(f"Your request payload could not be read ({type(error).__name__}: {error}).") from error


def _text_of(error: Exception) -> str:
    """A sentence for what was refused, else the traceback from the client's own lines on."""
    from nnsight.tracing.util import clean_traceback, filter_traceback

    if isinstance(error, _Refused):
        return str(error)
    frames = filter_traceback(clean_traceback(error.__traceback__), lambda frame: frame.f_code.co_filename != __file__)
    return "".join(traceback.format_exception(type(error), error, frames))


@contextlib.contextmanager
def _own_sources() -> Iterator[None]:
    """Forget a request's sources after it: nnsight keeps them by file and line, and the next one may differ there."""
    from nnsight.tracing.globals import BLOCKS, SOURCES

    stores: list[dict[Any, Any]] = [linecache.cache, SOURCES, BLOCKS]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, contents in zip(stores, before, strict=True):
            store.clear()
            store.update(contents)


class _Lines(io.TextIOBase):
    """Sends what a request prints, line by line."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.partial = ""

    def write(self, text: str) -> int:
        *lines, self.partial = (self.partial + text).split("\n")
        for line in lines:
            self.pipe.send(line)
        return len(text)


def main(descriptor: int, folder: str) -> None:
    """Load the model, say so, then run jobs until the pipe closes. A text sent is a printed line, an Outcome an end."""
    sys.meta_path.insert(0, _Absent())
    pipe = Connection(descriptor)
    host = Host(folder)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            job = pipe.recv()
            with contextlib.redirect_stdout(_Lines(pipe)), contextlib.redirect_stderr(_Lines(pipe)):
                outcome = host.run(job)
            pipe.send(outcome)
