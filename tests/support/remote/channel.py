"""Connections to clients, and how they end: late, in order, without a word, or never."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from remote.faults import Dropped, Fault, ShutDown, Silent, Slow, Staged, Trickle

Connections = Callable[[], Iterable[Any]]
"""Gives uvicorn's open connections."""

FOREVER = 3600.0
"""Longer than any test; the stop of the server ends it."""


class Unanswered(Exception):
    """There is nobody left to answer."""


def strikes(fault: Fault, stage: str) -> bool:
    """Whether `fault` is one of this stage."""
    return isinstance(fault, Staged) and fault.at == stage


def drop(connections: Connections, ended: HTTPConnection, reset: bool) -> None:
    """End the TCP connection under `ended`. ASGI has no word for that, so it is found by the client's port."""
    assert ended.client is not None
    for protocol in list(connections()):
        if protocol.client is not None and protocol.client[1] == ended.client.port:
            if reset:  # closing a socket that lingers for no time sends a reset
                raw = protocol.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            protocol.transport.abort()


async def strike_answer(fault: Fault, stage: str, connections: Connections, request: HTTPConnection) -> None:
    """Delay the answer to an HTTP request, or prevent it, where `fault` is one of this stage.

    Raises:
        Unanswered: The connection is gone.
    """
    if not strikes(fault, stage):
        return
    match fault:
        case Slow(seconds=seconds):
            await asyncio.sleep(seconds)
        case Silent():
            await asyncio.sleep(FOREVER)
            raise Unanswered
        case Dropped(reset=reset):
            drop(connections, request, reset)
            raise Unanswered
        case Trickle():
            return  # the answer's body is what comes slowly
        case _:
            raise ValueError(f"{fault} needs a websocket, and there is none at {stage!r}")


class Channel:
    """A client's websocket.

    Attributes:
        open: Whether the client is there and is to hear anything.
    """

    def __init__(self, websocket: WebSocket, connections: Connections) -> None:
        self._websocket = websocket
        self._connections = connections
        self.open = True

    async def send(self, message: str | bytes) -> None:
        """Send a frame, where somebody listens."""
        if not self.open:
            return
        with contextlib.suppress(RuntimeError):  # the client left, and `subscribe` has not noticed yet
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)

    async def strike(self, fault: Fault, stage: str) -> None:
        """Delay what comes next, or end the connection, where `fault` is one of this stage."""
        if not strikes(fault, stage) or not self.open:
            return
        if isinstance(fault, Slow):
            return await asyncio.sleep(fault.seconds)
        self.open = False
        if isinstance(fault, Dropped):
            drop(self._connections, self._websocket, fault.reset)
        elif isinstance(fault, ShutDown):
            await self._websocket.close(1012)
