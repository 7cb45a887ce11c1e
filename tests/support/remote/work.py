"""What passes between the stand-in and its `worker`: a job one way, what became of it the other way."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One request: the client's bytes, and the memory it may use.

    Attributes:
        payload: The serialized request.
        compress: Whether the payload is compressed, and the result is to be.
        env: What the client wants of the model before it runs.
        memory: How much fits, and what to say when it does not; None for no bound.
    """

    payload: bytes
    compress: bool
    env: dict[str, Any]
    memory: "Memory | None" = None


@dataclass(frozen=True)
class Memory:
    """A made-up memory, counted in layers and tokens. Running more than fits is out of memory.

    Attributes:
        layers: How many different layers one request may run; None for any number.
        tokens: How many tokens one request may run through a layer, over all its forwards; None for any number.
        device: Whose allocator refuses, "cuda" or "cpu".
    """

    layers: int | None
    tokens: int | None
    device: str


@dataclass
class Work:
    """What a request ran, counted while it did.

    Attributes:
        layers: How often each layer ran, by index; a skipped layer is not in it.
        tokens: How many tokens each layer ran, by index.
        forwards: How often the model was called.
    """

    layers: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    forwards: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
        work: What ran.
        runtime: Seconds.
        result: The saved values, as they go over the wire; None for a failure.
        error: The text for the client; None for a success.
        out_of_cuda: Whether the failure was the CUDA allocator's.
    """

    work: Work
    runtime: float
    result: bytes | None = None
    error: str | None = None
    out_of_cuda: bool = False
