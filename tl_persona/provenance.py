"""What a saved vector was computed from, and the rules that tell whether it would come out the same.

The digest covers exactly what decides the numbers. Versions and the path taken (backend, model class) are
recorded beside it: they move results by rounding at most, so they do not invalidate what is stored. Which weights a
vector is of, and what acted on the model, may be unknown; what is unknown is equal to nothing. Nothing here raises.
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
        revision: The checkpoint's commit or content fingerprint; None where there is none to know. Fingerprints that
            begin with `files-`, as earlier versions made them, count as unknown.
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
        weights_digest: `<kind>:<hex>` of the model that ran: `values` of its numbers, `HookedTransformer values` of
            numbers that only this class lays out so, `served` of what a server calls it. None where it is not known.
        interventions: What acted on the model beside its own parts: empty for nothing, a digest in hex of interventions
            of this package, `unknown` for a hook of somebody else's. None in files of earlier versions, whose notes
            have `hooks` where there was one.
        notes: Facts that do not decide the numbers beyond rounding: versions, model class, backend, path taken.

    Example:
        >>> a = Provenance(model_name="m", revision="abc", dtype="float32", weights="unprocessed",
        ...                hook_names=("blocks.0.hook_resid_post",), strategy="answer_mean",
        ...                prompts_digest=text_digest(["hello"]), sample_ids=("q1",))
        >>> b = msgspec.structs.replace(a, notes={"backend": "local"})
        >>> a.digest() == b.digest()
        True
        >>> a.differences(msgspec.structs.replace(a, dtype="bfloat16"))
        ["dtype: 'float32' is now 'bfloat16'"]
        >>> a.differences(msgspec.structs.replace(a, template_digest="t", tokens_digest="i"))
        []
        >>> a.differences(msgspec.structs.replace(a, revision=None))
        ['which weights the model has now is not known']
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
    weights_digest: str | None = None
    interventions: str | None = None
    notes: dict[str, Any] = {}

    @property
    def identity(self) -> dict[str, str]:
        """What tells which weights a vector is of: under `revision` that, under its kind the digest of the weights.

        In the order in which they decide; empty where nothing tells.
        """
        found = {}
        if self.revision is not None and not self.revision.startswith(_OLD_FINGERPRINT):
            found[_REVISION] = self.revision
        if self.weights_digest is not None:
            found[self.weights_digest.partition(":")[0]] = self.weights_digest
        return found

    @property
    def known_interventions(self) -> str | None:
        """`interventions`, also of a file of an earlier version; None where nobody knows what acted."""
        if self.interventions is None:
            return None if "hooks" in self.notes else ""
        return None if self.interventions == UNKNOWN else self.interventions

    def digest(self) -> str:
        """SHA-256, in hex, of every field that decides the numbers; files of earlier versions keep theirs."""
        decisive = {name: getattr(self, name) for name in _DECISIVE if name not in _OPTIONAL or getattr(self, name)}
        if _REVISION in self.identity:
            decisive.pop("weights_digest", None)
        canonical = json.dumps(decisive, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, current: "Provenance") -> list[str]:
        """One line for each reason why `current` would not, or may not, give what is recorded here."""
        lines = conflicts(self, current)
        if deciding_scheme(self.identity, current.identity) is None:
            lines.append(_unknown_weights(self.identity, current.identity))
        if self.known_interventions is None:
            lines.append("interventions: a hook that is not of this package was on the model: what it did is not known")
        elif current.known_interventions is None:
            lines.append("interventions: a hook that is not of this package is on the model: what it does is not known")
        for name in _DECISIVE:
            recorded, now = getattr(self, name), getattr(current, name)
            ruled = name in _RULED or (name in _OPTIONAL and None in (recorded, now))
            if recorded != now and not ruled:
                lines.append(f"{name}: {_short(recorded)} is now {_short(now)}")
        return lines


UNKNOWN = "unknown"
"""`interventions` where a hook that is not of this package is on the model."""

_REVISION = "revision"
_OLD_FINGERPRINT = "files-"  # of the ends of the files only: models that differ in the middle have the same
_DECISIVE = tuple(name for name in Provenance.__struct_fields__ if name not in ("template_digest", "notes"))
_OPTIONAL = ("tokens_digest", "weights_digest", "interventions")
_RULED = ("revision", "weights_digest", "interventions")


def deciding_scheme(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """By what two identities are compared: `revision` if both have one, else the kind of digest that both have.

    Args:
        one: `Provenance.identity` of a vector.
        other: That of another.

    Returns:
        None where they have nothing in common, so that it is not known whether they are of the same weights.

    Example:
        >>> deciding_scheme({"revision": "abc", "values": "values:1"}, {"values": "values:2"})
        'values'
        >>> deciding_scheme({"revision": "abc"}, {"values": "values:2"}) is None
        True
    """
    return next((scheme for scheme in one if scheme in other), None)


def conflicts(recorded: Provenance, current: Provenance, *, weights_only: bool = False) -> list[str]:
    """Why two vectors may not lie in one folder: they are known to be of other weights or under other interventions.

    Args:
        recorded: Of one.
        current: Of the other.
        weights_only: Whether interventions are left out.

    Returns:
        One line for each of both, which names both sides; none where they are alike, or it is not known.

    Example:
        >>> a = Provenance(model_name="m", revision=None, dtype="float32", weights="unprocessed", hook_names=(),
        ...                strategy="answer_mean", prompts_digest="", sample_ids=(), weights_digest="values:1")
        >>> conflicts(a, msgspec.structs.replace(a, weights_digest="values:2", interventions="3f"))
        ["weights_digest: 'values:1' is now 'values:2'", "interventions: 'none' is now '3f'"]
        >>> conflicts(a, msgspec.structs.replace(a, weights_digest=None, interventions="unknown"))
        []
    """
    lines = []
    scheme = deciding_scheme(recorded.identity, current.identity)
    if scheme is not None and recorded.identity[scheme] != current.identity[scheme]:
        what = scheme if scheme == _REVISION else "weights_digest"
        lines.append(f"{what}: {recorded.identity[scheme]!r} is now {current.identity[scheme]!r}")
    there, here = recorded.known_interventions, current.known_interventions
    if not weights_only and there is not None and here is not None and there != here:
        lines.append(f"interventions: {there or 'none'!r} is now {here or 'none'!r}")
    return lines


def _unknown_weights(recorded: Mapping[str, str], now: Mapping[str, str]) -> str:
    if not recorded:
        return "which weights it is of is not recorded"
    if not now:
        return "which weights the model has now is not known"
    (one, *_), (other, *_) = recorded.items(), now.items()
    return f"which weights it is of cannot be told: {_named(*one)} and {_named(*other)} do not compare"


def _named(scheme: str, value: str) -> str:
    return f"revision {value!r}" if scheme == _REVISION else repr(value)


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
    weights_digest: str | None,
    interventions: str | None,
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
        weights_digest: Of the model that runs.
        interventions: What acts on it now.
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
        weights_digest=weights_digest,
        interventions=interventions,
    )
