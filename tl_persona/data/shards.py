"""Which personas a process takes when several share one run: the one of position p in the list goes to shard p mod N.

Pure: a shard follows from the arguments and the environment's variables alone, so processes need not talk to each
other. SLURM, torchrun or a shell starts them.

Shards count from 0, as the ranks of torchrun and SLURM do: `0/4`, `1/4`, `2/4` and `3/4` together are everything.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tl_persona.errors import InputError

AUTO = "auto"

Item = TypeVar("Item")

_INTERACTIVE_STEPS_FROM = 0xFFFFFFF0
"""SLURM numbers its own steps (batch script, interactive shell) from here; what `srun` starts counts from 0."""


@dataclass(frozen=True)
class Shard:
    """One of `count` disjoint parts of a run.

    Attributes:
        index: Which part, from 0.
        count: How many there are.
        source: What said so, for messages.

    Raises:
        InputError: The index is not in `0 .. count - 1`.
    """

    index: int
    count: int
    source: str = "--shard"

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            shards = f"they count from 0: 0/{self.count} to {self.count - 1}/{self.count}" if self.count > 0 else "none"
            raise InputError(f"{self.source}: there is no shard {self.index}/{self.count}; {shards}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items at this shard's positions, in their order; empty where there are more shards than items.

        Example:
            >>> [Shard(index, 3).of("abcdefg") for index in range(3)]
            [['a', 'd', 'g'], ['b', 'e'], ['c', 'f']]
        """
        return list(items[self.index :: self.count])

    def within(self, outer: "Shard") -> "Shard":
        """This shard of each of the parts of `outer`: the two levels as one.

        Example:
            >>> str(Shard(1, 2).within(Shard(3, 10)))
            '7/20'
        """
        source = f"{outer.source} and {self.source}"
        return Shard(outer.index * self.count + self.index, outer.count * self.count, source)


def parse_shard(text: str, environ: Mapping[str, str]) -> Shard:
    """The shard that `--shard` names: `I/N`, or `auto` for what the environment says.

    Raises:
        InputError: Another text, an index out of range, or `auto` where `shard_from_environment` finds nothing.

    Example:
        >>> str(parse_shard("2/8", {}))
        '2/8'
        >>> str(parse_shard("auto", {"RANK": "1", "WORLD_SIZE": "4"}))
        '1/4'
    """
    if text == AUTO:
        return shard_from_environment(environ)
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise InputError(f"--shard {text}: write I/N with I from 0 to N - 1, such as 0/4, or {AUTO}")
    return Shard(int(match[1]), int(match[2]))


def shard_from_environment(environ: Mapping[str, str]) -> Shard:
    """The shard of this process among those that SLURM or torchrun started.

    Within a job, torchrun's `RANK` of `WORLD_SIZE` comes first, then `srun`'s `SLURM_PROCID` of its tasks: torchrun
    started by `srun` numbers the processes of all nodes. A job of a SLURM array is one part of the array; several
    processes in it share that part, so the array and what runs inside it multiply.

    Raises:
        InputError: Neither is there, a variable is no number, or the array's ids have gaps.
    """
    array = _array_shard(environ)
    inner = _torchrun_shard(environ)
    if inner is None and (array is None or _is_srun_step(environ)):
        # A batch script has SLURM_PROCID 0 of all its tasks, though it is no task: in an array it counts as alone.
        inner = _srun_shard(environ)
    if array is not None:
        return array if inner is None else inner.within(array)
    if inner is None:
        raise InputError(
            f"--shard {AUTO}: no SLURM_ARRAY_TASK_ID, SLURM_PROCID or RANK in the environment. "
            "Start it under SLURM or torchrun, or give --shard I/N"
        )
    return inner


def looks_like_a_batch_script(environ: Mapping[str, str]) -> bool:
    """Whether `SLURM_PROCID` may be a batch script's, which is one process however many tasks its job asked for."""
    tasks = environ.get("SLURM_NTASKS", "1")
    known = "RANK" in environ or "SLURM_ARRAY_TASK_ID" in environ or _is_srun_step(environ)
    return not known and environ.get("SLURM_PROCID") == "0" and tasks != "1"


def own_device(environ: Mapping[str, str], n_devices: int) -> str | None:
    """The CUDA device of this process among those it sees, or None where nothing numbers it on its machine.

    `LOCAL_RANK` of torchrun, else `SLURM_LOCALID` of a task of `srun`. Counting wraps around: with fewer devices than
    processes some are shared, and a task to which SLURM shows just its own device takes that one.

    Raises:
        InputError: The variable is no number.

    Example:
        >>> own_device({"LOCAL_RANK": "3"}, 8)
        'cuda:3'
    """
    name = "LOCAL_RANK" if "LOCAL_RANK" in environ else "SLURM_LOCALID"
    if n_devices == 0 or name not in environ or (name == "SLURM_LOCALID" and not _is_srun_step(environ)):
        return None
    return f"cuda:{_number(environ, name) % n_devices}"


def _array_shard(environ: Mapping[str, str]) -> Shard | None:
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    task, first, last = (_number(environ, f"SLURM_ARRAY_TASK_{part}") for part in ("ID", "MIN", "MAX"))
    step = _number(environ, "SLURM_ARRAY_TASK_STEP", 1)
    position, rest = divmod(task - first, max(step, 1))
    count = (last - first) // max(step, 1) + 1
    if rest or _number(environ, "SLURM_ARRAY_TASK_COUNT", count) != count:
        # SLURM says how many ids there are, not which: the place of this one among them cannot be told.
        raise InputError(
            f"--shard {AUTO}: the ids of this SLURM array have gaps (task {task} of {first}-{last}, step {step}): "
            "use a plain range such as --array=0-7, or give --shard I/N"
        )
    return Shard(position, count, "SLURM_ARRAY_TASK_ID")


def _torchrun_shard(environ: Mapping[str, str]) -> Shard | None:
    if "RANK" not in environ:
        return None
    return Shard(_number(environ, "RANK"), _number(environ, "WORLD_SIZE"), "RANK")


def _srun_shard(environ: Mapping[str, str]) -> Shard | None:
    if "SLURM_PROCID" not in environ:
        return None
    # The step's own number of tasks is the right one where `srun` was given fewer than the job has.
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return Shard(_number(environ, "SLURM_PROCID"), _number(environ, count), "SLURM_PROCID")


def _is_srun_step(environ: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _INTERACTIVE_STEPS_FROM


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text):
        raise InputError(
            f"{name} is {'not set' if text is None else repr(text)}: give --shard I/N and --device instead"
        )
    return int(text)
