"""What a saved vector was computed from, and the digest that tells whether it would come out the same.

The digest covers exactly what decides the numbers. Versions and the path taken (backend, model class) are
recorded beside it: they move results by rounding at most, so they do not invalidate what is stored.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
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
        tokens_digest: `tokens_digest` of the token ids and masks, in sample order; None where it was not recorded,
            which leaves a comparison to the other fields.
        template_digest: `prompts.template.template_digest` of the chat template in use; None for text without a
            template, or where it was not recorded. It decides nothing by itself: another template that renders and
            masks the same prompts gives the same vector.
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
        >>> a.differences(msgspec.structs.replace(a, template_digest="t", tokens_digest="i"))
        []
    """

    model_name: str
    revision: str | None
    dtype: str
    weights: str
    hook_names: tuple[str, ...]
    strategy: str
    prompts_digest: str
    sample_ids: tuple[str, ...]
    tokens_digest: str | None = None
    template_digest: str | None = None
    notes: dict[str, Any] = {}

    def digest(self) -> str:
        """SHA-256, in hex, of every field that decides the numbers."""
        decisive = {name: getattr(self, name) for name in _DECISIVE if name not in _OPTIONAL or getattr(self, name)}
        canonical = json.dumps(decisive, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, current: "Provenance") -> list[str]:
        """One line for each decisive field in which `current` differs from what is recorded here."""
        lines = []
        for name in _DECISIVE:
            recorded, now = getattr(self, name), getattr(current, name)
            unknown = name in _OPTIONAL and None in (recorded, now)
            if recorded != now and not unknown:
                lines.append(f"{name}: {_short(recorded)} is now {_short(now)}")
        return lines


_DECISIVE = tuple(name for name in Provenance.__struct_fields__ if name not in ("template_digest", "notes"))
_OPTIONAL = ("tokens_digest",)


def text_digest(texts: Sequence[str]) -> str:
    """SHA-256, in hex, of texts in order; lengths are hashed too, so that moving a boundary changes it."""
    hasher = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        hasher.update(len(encoded).to_bytes(8, "big"))
        hasher.update(encoded)
    return hasher.hexdigest()


def tokens_digest(rows: Iterable[tuple[bytes, bytes]]) -> str:
    """SHA-256, in hex, of token ids and masks, as bytes of one fixed width, text by text in order.

    Example:
        >>> tokens_digest([(b"abc", b"011")]) == tokens_digest([(b"abc", b"110")])
        False
        >>> tokens_digest([(b"abc", b"011")]) == tokens_digest([(b"ab", b"01"), (b"c", b"1")])
        False
    """
    hasher = hashlib.sha256()
    for row in rows:
        for part in row:
            hasher.update(len(part).to_bytes(8, "big"))
            hasher.update(part)
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


def provenance_of(
    *,
    model_name: str,
    revision: str | None,
    dtype: str,
    weights: str,
    hook_names: Sequence[str],
    strategy: str,
    texts: Sequence[str],
    sample_ids: Sequence[str],
    tokens: Iterable[tuple[bytes, bytes]],
    template_digest: str | None,
) -> Provenance:
    """What decides a vector, from the texts that were run and the ids and masks of their tokens.

    Args:
        model_name: As `Provenance` has it, like the others that are not named here.
        revision: The checkpoint's.
        dtype: Of the parameters.
        weights: How they were processed.
        hook_names: In the order of the vector's first axis.
        strategy: Mask strategy or token position.
        texts: The rendered prompts, in sample order.
        sample_ids: Their ids.
        tokens: For each text its token ids and its mask, as `tokens_digest` takes them.
        template_digest: Of the chat template.
    """
    return Provenance(
        model_name=model_name,
        revision=revision,
        dtype=dtype,
        weights=weights,
        hook_names=tuple(hook_names),
        strategy=strategy,
        prompts_digest=text_digest(texts),
        sample_ids=tuple(sample_ids),
        tokens_digest=tokens_digest(tokens),
        template_digest=template_digest,
    )
