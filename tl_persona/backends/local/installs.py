"""Keeps TransformerLens from installing packages while it boots a model, and says how to install them by hand.

Where torchvision is missing, booting a model that also reads images makes TransformerLens run `pip install
torchvision`, which may replace torch under the running program. Here no process is started: TransformerLens goes on
without an image processor, and texts need none. Other threads may start processes meanwhile, and so may compiled code.
"""

import functools
import logging
import multiprocessing.util
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from tl_persona.errors import ModelError

_STARTERS: tuple[tuple[ModuleType | type, tuple[str, ...]], ...] = (
    (subprocess, ("run", "call", "check_call", "check_output", "getoutput", "getstatusoutput")),
    (subprocess.Popen, ("__init__",)),
    (multiprocessing.util, ("spawnv_passfds",)),
    (os, ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile")),
    (os, ("spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe")),
)
"""All that starts a process in Python's library. Functions are listed beside the `Popen` that they use, so that
they are refused before they have done anything."""

_here = threading.local()
_lock = threading.Lock()
_replaced: list[tuple[Any, str, Any, Any]] = []
_inside = 0


class ProcessRefused(ModelError, PermissionError):
    """A process that was about to be started while a model is booted.

    A `PermissionError`, which the system itself raises where no process may be started, so that code that can do
    without one goes on.
    """


@contextmanager
def no_processes() -> Iterator[None]:
    """Until the end of the block, whatever would start a process in this thread raises `ProcessRefused`."""
    outside = not getattr(_here, "refusing", False)
    if outside:
        _replace()
        _here.refusing = True
    try:
        yield
    finally:
        if outside:
            _here.refusing = False
            _restore()


def _replace() -> None:
    """Replaces every starter by one that looks in which thread it runs, unless another thread has done so."""
    global _inside
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        for owner, names in _STARTERS:
            for name in names:
                original = vars(owner).get(name)
                if original is not None:  # not every system has them all
                    refusing = _refusing(original)
                    setattr(owner, name, refusing)
                    _replaced.append((owner, name, original, refusing))


def _restore() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside:
            return
        for owner, name, original, refusing in reversed(_replaced):
            if vars(owner).get(name) is refusing:  # else it was replaced again since, by something that calls ours
                setattr(owner, name, original)
        _replaced.clear()


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def starter(*args: Any, **kwargs: Any) -> Any:
        if getattr(_here, "refusing", False):
            command = _command(args, kwargs)
            logging.getLogger(__name__).info("refused to start a process while a model is booted: %s", command)
            raise ProcessRefused(
                f"this was not run, because booting a model starts no process: {command}. "
                "If it is needed, run it yourself, then load the model again"
            )
        return original(*args, **kwargs)

    return starter


def _command(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [each for each in (*args, kwargs.get("args")) if isinstance(each, str | list | tuple)]
    words = given[0] if given else "a process"
    return words if isinstance(words, str) else shlex.join(map(str, words))


def install_advice(error: ImportError) -> str:
    """How to install what an import missed, without touching torch."""
    kept = f"with --no-deps pip leaves torch {torch.__version__} as it is"
    if "torchvision" not in f"{error.name} {error}":
        return f"install it with `pip install --no-deps {error.name or 'PACKAGE'}`; {kept}"
    release, _, build = torch.__version__.partition("+")
    minor = re.match(r"2\.(\d+)", release)
    # torchvision 0.15 was made for torch 2.0, 0.16 for 2.1, and so on; a wheel for another build does not import.
    wanted = f"torchvision==0.{int(minor[1]) + 15}.*" if minor else "torchvision"
    index = f" --extra-index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"install it with `pip install --no-deps '{wanted}' pillow{index}`; {kept}"
