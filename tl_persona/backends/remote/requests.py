"""One payload in, its sums out: on a server, through the journal, or in this process; checked before they are used."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_persona.backends.base import OnStatus
from tl_persona.backends.remote.jobs import Jobs, Journal, request_digest
from tl_persona.backends.remote.model import RemoteModel
from tl_persona.backends.remote.sites import Site, Sites
from tl_persona.backends.remote.tracing import Chunk, Payload, run_passes, serialize
from tl_persona.backends.remote.transport import Transport
from tl_persona.errors import RemoteRefusedError
from tl_persona.tensors import SlotSums

_NOTHING = Payload((), 0)


class Requests:
    """Runs payloads on one model.

    Args:
        model: The model, and the server where it has one.
        sites: Where its hooks are.
        journal: Remembers jobs and results.
        on_status: Told how jobs are.
    """

    def __init__(self, model: RemoteModel, sites: Sites, journal: Journal, on_status: OnStatus | None) -> None:
        self._model, self._sites, self._journal = model, sites, journal
        self._config = model.nnsight_model._module.config.get_text_config()
        self._jobs: Jobs | None = None
        if model.settings is not None:
            env = model.nnsight_model._remoteable_get_env()
            self._jobs = Jobs(Transport(model.settings, model.model_key, env), model.settings, journal, on_status)

    def dtype(self) -> str:
        """The parameters' dtype, such as `bfloat16`, as the server has it.

        Raises:
            RemoteError: The server does not answer, or will not run the model.
        """
        result = self._result(_NOTHING, [], Chunk(0, 0), None)
        found = result.get("dtype")
        if not (isinstance(found, str) and isinstance(getattr(torch, found.removeprefix("torch."), None), torch.dtype)):
            raise RemoteRefusedError(f"the server says that its parameters are {found!r}, which is no dtype")
        return found.removeprefix("torch.")

    def run(self, payload: Payload, hook_names: Sequence[str], chunk: Chunk) -> tuple[SlotSums, tuple[Tensor, ...]]:
        """The sums of the payload's slots in the order of the hooks, and the residuals that the chunk leaves.

        Raises:
            CapacityFailure: It was too much for the server.
            RemoteUnavailableError: The server could not be reached, or did not finish, within the time.
            RemoteRefusedError: It failed for good, or what came back is not what was asked for.
        """
        order = self._sites.in_order(hook_names)
        sites = [self._sites.site(hook_names[index]) for index in order]
        digest = self._digest(payload, sites, chunk)
        result = self._kept(digest)
        if result is None:
            result = self._result(payload, sites, chunk, digest)
            self._check(result, payload, len(order), chunk)
            residuals = {f"residual{number:06}": value for number, value in enumerate(result["residuals"])}
            self._journal.received(digest, {"sums": result["sums"], **residuals})
        sums = torch.empty_like(result["sums"])
        sums[:, order] = result["sums"]
        return sums, tuple(result["residuals"])

    def _digest(self, payload: Payload, sites: Sequence[Site], chunk: Chunk) -> str:
        """What names a request: all that decides its result."""
        host = self._model.settings.host if self._model.settings else None
        return request_digest(
            [host, self._model.model_key, self._model.revision],
            [payload.passes, payload.cache_name, [tuple(site) for site in sites]],
            [chunk.start, chunk.stop, chunk.entries, chunk.leave],
        )

    def _kept(self, digest: str) -> dict[str, Any] | None:
        kept = self._journal.result(digest)
        if kept is None or "sums" not in kept:
            return None
        return {"sums": kept.pop("sums"), "residuals": [kept[name] for name in sorted(kept)]}

    def _result(self, payload: Payload, sites: Sequence[Site], chunk: Chunk, digest: str | None) -> dict[str, Any]:
        model, blocks = self._model.nnsight_model, self._sites.blocks
        if self._jobs is None:
            try:
                return run_passes(model, payload, sites, blocks, chunk)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # as a server puts it: whatever the model raises ends the request
                raise RemoteRefusedError(f"the model raised {type(error).__name__}: {error}") from error
        tokens = sum(each["ids"].numel() for each in payload.passes)
        numbers = payload.n_slots * len(sites) + (tokens if chunk.leave else 0)
        saved = self._jobs.run(
            digest,
            lambda: serialize(model, payload, sites, blocks, chunk),
            # Twice what float32 takes, and room for the archive's own structure.
            max_bytes=8 * numbers * self._config.hidden_size + (1 << 20),
        )
        result = saved.get("result")
        if not isinstance(result, dict):
            raise RemoteRefusedError(
                f"the server sent {'nothing' if result is None else type(result).__name__} in place of the result: its "
                "nnsight differs from the one here, or it is not to be trusted"
            )
        return result

    def _check(self, result: dict[str, Any], payload: Payload, n_hooks: int, chunk: Chunk) -> None:
        """Compares what came back with what was asked for, before any number is used.

        Raises:
            RemoteRefusedError: It is something else.
        """
        width = self._config.hidden_size
        _check_tensor(result.get("sums"), (payload.n_slots, n_hooks, width), torch.float32)
        wanted = [(*each["ids"].shape, width) for each in payload.passes] if chunk.leave else []
        found = result.get("residuals")
        if not isinstance(found, list) or len(found) != len(wanted):
            raise RemoteRefusedError(f"the server sent other residuals than those of {len(wanted)} passes")
        for residual, shape in zip(found, wanted, strict=True):
            _check_tensor(residual, shape, None)


def _check_tensor(value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Checks one tensor; without a dtype any floating-point one will do."""
    if not isinstance(value, Tensor):
        raise RemoteRefusedError(f"the server sent a {type(value).__name__} in place of a tensor")
    right = value.dtype == dtype if dtype else value.is_floating_point()
    if tuple(value.shape) != shape or not right:
        raise RemoteRefusedError(
            f"the server sent {value.dtype} of shape {tuple(value.shape)} where {dtype or 'floating point'} of shape "
            f"{shape} was asked for: its versions differ from those here, or it is not to be trusted"
        )
