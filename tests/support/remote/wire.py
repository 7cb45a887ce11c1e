"""The stand-in's HTTP and websocket side: what a client sees. `jobs` runs the jobs, `channel` ends the connections.

Forms and streams are handled by hand: Starlette leaves them to anyio, whose first use fails in a process where nnsight
has put its `save` on every object, and that is what a test's process is.
"""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from remote.channel import Channel, Connections, Unanswered, drop, strike_answer, strikes
from remote.faults import DownloadFails, Dropped, Fault, PollFails, Rejected, Silent, Trickle
from remote.jobs import JobRunner, status_message
from remote.records import Record

if TYPE_CHECKING:
    from remote.standin import Standin


def application(standin: "Standin", connections: Connections) -> Starlette:
    """The routes of an NDIF server that nnsight's client uses, over one stand-in."""
    wire = _Wire(standin, connections)
    return Starlette(
        routes=[
            WebSocketRoute("/subscribe", wire.subscribe),
            Route("/request", wire.request, methods=["POST"]),
            Route("/response/{job_id}", wire.response),
            Route("/results/{job_id}.pt", wire.result),
            Route("/ping", wire.ping),
            Route("/connected", wire.connected),
            Route("/status", wire.status),
            Route("/env", wire.environment),
            Route("/whoami", wire.whoami),
        ],
        exception_handlers={Unanswered: _no_answer},
    )


class _Wire:
    def __init__(self, standin: "Standin", connections: Connections) -> None:
        self.standin = standin
        self.connections = connections
        self.channels: dict[str, Channel] = {}
        self.runner = JobRunner(standin)
        self.tasks: set[asyncio.Task[None]] = set()

    # A client's way: subscribe (or not), request, then frames (or polls), then a download where the result is large.

    async def subscribe(self, websocket: WebSocket) -> None:
        await websocket.accept()
        session = uuid.uuid4().hex
        channel = self.channels[session] = Channel(websocket, self.connections)
        try:
            await channel.strike(self.standin.take_subscription(), "subscribe")
            await channel.send(json.dumps({"session_id": session}))
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            channel.open = False
        finally:
            del self.channels[session]

    async def request(self, request: Request) -> Response:
        form = _form(request.headers["content-type"], await request.body())
        envelope, payload = json.loads(form["data"]), form["blob"]
        key = request.headers.get("ndif-api-key")
        session = envelope["session_id"]
        record = Record(
            0, uuid.uuid4().hex, envelope["model_key"], bool(session), key is not None, len(payload), Fault()
        )
        fault = self.standin.take(record)
        refusal = fault if isinstance(fault, Rejected) else self._refusal(key)
        if refusal is not None or (strikes(fault, "request") and isinstance(fault, Dropped | Silent)):
            record.status = "REJECTED"
        await strike_answer(fault, "request", self.connections, request)
        if refusal is not None:
            return JSONResponse({"detail": refusal.detail}, refusal.status)
        job = self.runner.run(record, envelope, payload, self.channels.get(session))
        task = asyncio.create_task(job)
        self.tasks.add(task)  # asyncio alone would let it be collected
        task.add_done_callback(self.tasks.discard)
        text = "Your job has been received and is waiting to be queued."
        return _json(status_message(record, "RECEIVED", text))

    async def response(self, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        record = self.standin.record_of(job_id)
        if record is not None:
            record.polls += 1
            fault = record.fault
            await strike_answer(fault, "poll", self.connections, request)
            if isinstance(fault, PollFails) and (fault.polls is None or record.polls <= fault.polls):
                return self._failure(request, fault.status)
            if isinstance(fault, Trickle) and fault.at == "poll" and (told := self.standin.statuses.get(job_id)):
                return _Pieces(told.encode(), fault)
        stored = self.standin.statuses.get(job_id)
        return _json(stored) if stored else JSONResponse({"detail": f"No response for request {job_id}."}, 404)

    async def result(self, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        record, stored = self.standin.record_of(job_id), self.standin.results.get(job_id)
        if record is not None:
            record.downloads += 1
            fault = record.fault
            await strike_answer(fault, "download", self.connections, request)
            if isinstance(fault, DownloadFails) and (fault.downloads is None or record.downloads <= fault.downloads):
                if fault.status is None and stored is not None:
                    return _Half(stored, lambda: drop(self.connections, request, reset=False))
                return self._failure(request, fault.status)
            if isinstance(fault, Trickle) and fault.at == "download" and stored is not None:
                return _Pieces(stored, fault)
        if stored is None:
            return PlainTextResponse("<Error><Code>NoSuchKey</Code></Error>", 404)
        return Response(stored, media_type="application/octet-stream")

    # What tells about the server.

    async def ping(self, _request: Request) -> Response:
        return JSONResponse("pong")

    async def connected(self, _request: Request) -> Response:
        return JSONResponse({"status": "connected"})

    async def status(self, _request: Request) -> Response:
        key = self.standin.model_key
        identity = json.loads(key.partition(":")[2])
        about = {**identity, "model_key": key, "deployment_level": "HOT", "application_state": "RUNNING"}
        return JSONResponse({"deployments": {key: about}})

    async def environment(self, _request: Request) -> Response:
        from nnsight.ndif import get_local_env

        return JSONResponse(self.standin.environment or await asyncio.to_thread(get_local_env))

    async def whoami(self, _request: Request) -> Response:
        return JSONResponse({"email": None, "tags": []})

    # What is refused, and how.

    def _refusal(self, key: str | None) -> Rejected | None:
        known = self.standin.keys
        if known is None:
            return None
        if not key:
            return Rejected(401, "Missing or invalid API key.")
        if key in known:
            return None
        with contextlib.suppress(ValueError):
            uuid.UUID(key)
            return Rejected(403, "Invalid API key.")
        return Rejected(400, f"Invalid API key format: '{key}'.")  # it repeats the key, and so does the real one

    def _failure(self, request: Request, status: int | None) -> Response:
        if status is None:
            drop(self.connections, request, reset=False)
            raise Unanswered
        return PlainTextResponse("failed on cue", status)


class _Half(Response):
    """An answer that promises all of `content`, sends half, and ends with `hang_up`."""

    def __init__(self, content: bytes, hang_up: Callable[[], None]) -> None:
        super().__init__(content)
        self.hang_up = hang_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})
        await asyncio.sleep(0.05)
        self.hang_up()


class _Pieces(Response):
    """An answer whose body takes its time."""

    def __init__(self, content: bytes, fault: Trickle) -> None:
        super().__init__(content)
        self.fault = fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        size = max(1, -(-len(self.body) // self.fault.pieces))
        for start in range(0, len(self.body), size):
            await asyncio.sleep(self.fault.seconds)
            await send(
                {"type": "http.response.body", "body": bytes(self.body[start : start + size]), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b""})


def _form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a multipart form by name."""
    fields = {}
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    for part in body.split(boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]+)"', head)
        assert name is not None
        fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


async def _no_answer(_request: Request, _error: Exception) -> Response:
    """Goes nowhere: the connection is closed."""
    return Response()
