"""What a saved vector was computed from, and the digest that tells whether it would come out the same.

The digest covers exactly what decides the numbers. Versions and the path taken (backend, model class) are
recorded beside it: they move results by rounding at most, so they do not invalidate what is stored.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import msgspec


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a vector comes from.

    Attributes:
        model_name: The name the caller gave the model.
        revision: The checkpoint's commit or content fingerprint; None where there is none to know.
        dtype: Parameter dtype, such as `float32`.
        weights: `unprocessed`, or the processing applied, such as `fold_ln+center_writing_weights`.
        hook_names: The hooks, in the order of the vector's first axis.
        strategy: Mask strategy or token position.
        prompts_digest: `text_digest` of the rendered prompts, in sample order.
        sample_ids: The ids of the samples, in order.
        notes: Facts that do not decide the numbers beyond rounding: versions, model class, backend, path taken.

    Example:
        >>> a = Provenance(model_name="m", revision=None, dtype="float32", weights="unprocessed",
        ...                hook_names=("blocks.0.hook_resid_post",), strategy="answer_mean",
        ...                prompts_digest=text_digest(["hello"]), sample_ids=("q1",))
        >>> b = msgspec.structs.replace(a, notes={"backend": "local"})
        >>> a.digest() == b.digest()
        True
        >>> a.differences(msgspec.structs.replace(a, dtype="bfloat16"))
        ["dtype: 'float32' is now 'bfloat16'"]
    """

    model_name: str
    revision: str | None
    dtype: str
    weights: str
    hook_names: tuple[str, ...]
    strategy: str
    prompts_digest: str
    sample_ids: tuple[str, ...]
    notes: dict[str, Any] = {}

    def digest(self) -> str:
        """SHA-256, in hex, of every field that decides the numbers."""
        decisive = {name: getattr(self, name) for name in _DECISIVE}
        canonical = json.dumps(decisive, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, current: "Provenance") -> list[str]:
        """One line for each decisive field in which `current` differs from what is recorded here."""
        lines = []
        for name in _DECISIVE:
            recorded, now = getattr(self, name), getattr(current, name)
            if recorded != now:
                lines.append(f"{name}: {_short(recorded)} is now {_short(now)}")
        return lines


_DECISIVE = tuple(name for name in Provenance.__struct_fields__ if name != "notes")


def text_digest(texts: Sequence[str]) -> str:
    """SHA-256, in hex, of texts in order; lengths are hashed too, so that moving a boundary changes it."""
    hasher = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        hasher.update(len(encoded).to_bytes(8, "big"))
        hasher.update(encoded)
    return hasher.hexdigest()


@cache
def software_versions() -> Mapping[str, str]:
    """Versions of the packages that compute, for a provenance's notes; read from their metadata once a process."""
    versions = {}
    for package in ("tl-persona", "transformer-lens", "transformers", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return MappingProxyType(versions)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} entries"
    return repr(value)
