"""What the stand-in keeps of each request, for tests to count."""

from dataclasses import dataclass

from remote.faults import Fault


@dataclass
class Record:
    """One request as the server saw it. The key that came with it is never kept.

    Attributes:
        number: Position among all requests, from 0.
        job_id: What the client polls by.
        model_key: Which model was asked for.
        blocking: Whether the client waits at a websocket.
        had_key: Whether a key came with it.
        bytes_in: Size of the request.
        fault: What was done to it; a plain `Fault` for nothing.
        status: The last one it reached, told or not; "REJECTED" where no job was made of it.
        layers: Which layers ran, in order.
        layer_calls: How often a layer ran, summed over layers.
        forwards: How often the model was called.
        tokens: The most tokens that any layer ran.
        bytes_out: Size of the result.
        polls: How often its status was asked for.
        downloads: How often its result was asked for by address.
    """

    number: int
    job_id: str
    model_key: str
    blocking: bool
    had_key: bool
    bytes_in: int
    fault: Fault
    status: str = "RECEIVED"
    layers: tuple[int, ...] = ()
    layer_calls: int = 0
    forwards: int = 0
    tokens: int = 0
    bytes_out: int = 0
    polls: int = 0
    downloads: int = 0
