"""Whether a hooked model is the transformers model that it was made from: compared before its first use.

TransformerLens writes every architecture anew, from the configuration, and some configurations say more than it reads.
So no class is trusted for its name: the residual of every block is compared, on a text of random tokens, and again when
a plan first crosses a longer length at which the model may change its ways. What differs is not used.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tl_persona.backends.local.differences import difference, site_differences
from tl_persona.backends.local.inspection import longest_text
from tl_persona.backends.local.reference import NoReferenceError, Reference
from tl_persona.backends.local.verdicts import Difference, VerdictFile
from tl_persona.errors import ModelMismatchError
from tl_persona.models.facts import HookedModel
from tl_persona.provenance import software_versions

SHORT = 64
"""Tokens of the text that a model is compared on when it is loaded."""

LONGEST_AT_ONCE = 512
"""The same, where the configuration names a length up to this: the text goes just past it."""

PAST = 8
"""Tokens past a length that are enough to see that it was crossed."""


@dataclass
class Check:
    """What is known of one hooked model.

    Attributes:
        reference: What it is compared with; None where there is nothing.
        reason: Why there is nothing.
        lengths: At which the model may change its ways, as its configuration names them.
        compared: Lengths of the texts that it was compared on.
        sites: Hooks that were compared beside the residuals after blocks.
        verdicts: Where verdicts are kept for other processes.
        reopen: Loads the reference again, for a class that keeps no weights in common with it.
        itself: Whether the model is the transformers model, so that there is nothing to compare.
    """

    reference: Reference | None = None
    reason: str = ""
    lengths: tuple[int, ...] = ()
    compared: list[int] = field(default_factory=list)
    sites: set[str] = field(default_factory=set)
    verdicts: VerdictFile | None = None
    reopen: Callable[[], Any] | None = None
    itself: bool = False


_COMPARABLE = re.compile(r"(blocks\.\d+\.)?hook_(resid_pre|resid_mid|embed)")
"""Hooks beside the residual after a block that stand for a value which passes between modules in transformers; what
is added to the stream has a test of its own (`parts`)."""

_CHECKS: "WeakKeyDictionary[Any, Check]" = WeakKeyDictionary()

UNKNOWN_ORIGIN = "it was not made here; tl_persona.check_model compares it with a transformers model"


def known_check(model: HookedModel) -> Check:
    """What is known of a hooked model."""
    return _CHECKS.setdefault(model, Check(reason=UNKNOWN_ORIGIN))


def forget_comparisons(model: HookedModel, *, keep_reference: bool) -> None:
    """Have a model that has changed compared anew; what was kept of its checkpoint speaks of it no longer.

    Args:
        model: The model.
        keep_reference: Whether the reference has changed with it, as it does where values alone were written.
    """
    check = known_check(model)
    check.verdicts = check.reopen = None
    if not keep_reference:
        check.reference = None
    if check.reference is not None or not keep_reference:  # a class with weights of its own stays the function it was
        check.compared.clear()
        check.sites.clear()
    if check.reference is None:
        check.reason = check.reason or "it has changed since it was loaded"


def remember_check(model: HookedModel, check: Check) -> None:
    """Remember what a model is to be compared with, for as long as it lives."""
    _CHECKS[model] = check


def check_note(model: HookedModel) -> str:
    """What is known of a hooked model, for provenance; it does not depend on which texts ran."""
    check = known_check(model)
    if check.itself:
        return "the transformers model itself"
    if not check.compared:
        return f"unchecked: {check.reason}"
    if check.reference is None and check.reopen is None:
        return f"compared with transformers up to {max(check.compared)} tokens, unchecked past that"
    return "compared with transformers"


def require_same(model: HookedModel, longest: int = 0, names: Sequence[str] = ()) -> None:
    """Compares a model, if it was not yet, at the length for a first use and at those that a text crosses.

    Args:
        model: A hooked model.
        longest: Tokens of the longest text that is to run.
        names: Hooks that are to be read; those other than residuals after a block are compared when first asked for.

    Raises:
        ModelMismatchError: It differs from the transformers model.
    """
    check = known_check(model)
    if check.reference is None and check.reopen is None:
        return
    for n_tokens in lengths_to_compare(check.lengths, longest_text(model) or 0, longest):
        if not any(_speaks_for(done, n_tokens, check.lengths) for done in check.compared):
            _compare_at(model, check, n_tokens)
    asked = [name for name in names if _COMPARABLE.fullmatch(name) and name not in check.sites]
    if asked and check.compared:
        _compare_sites(model, check, asked)


def lengths_to_compare(lengths: Sequence[int], n_ctx: int, longest: int) -> list[int]:
    """How long the texts are that a model is compared on.

    Args:
        lengths: Those that its configuration names.
        n_ctx: The longest text it takes; 0 where it has no limit.
        longest: Tokens of the longest text that is to run.

    Example:
        >>> lengths_to_compare([], 2048, 0), lengths_to_compare([256, 4096], 32768, 0)
        ([64], [264])
        >>> lengths_to_compare([256, 4096], 32768, 5000)
        [264, 4104]
    """
    limit = n_ctx or max([SHORT, *lengths]) + PAST
    crossable = [length for length in sorted(set(lengths)) if length < limit]
    first = SHORT
    if crossable and SHORT - PAST < crossable[0] <= LONGEST_AT_ONCE:
        first = crossable[0] + PAST
    wanted = [first, *(length + PAST for length in crossable if first <= length < longest)]
    return sorted({min(n_tokens, limit) for n_tokens in wanted})


def _speaks_for(done: int, n_tokens: int, lengths: Sequence[int]) -> bool:
    """Whether a comparison at one length holds at another: no named length lies between them."""
    low, high = sorted((done, n_tokens))
    return not any(low <= length < high for length in lengths)


def _opened(check: Check) -> Reference | None:
    if check.reference is None and check.reopen is not None:
        return Reference(check.reopen())
    return check.reference


def _compare_sites(model: HookedModel, check: Check, names: Sequence[str]) -> None:
    n_tokens = min(check.compared)
    known: dict[str, Difference] = {}
    for name in names:
        kept = None if check.verdicts is None else check.verdicts.get(n_tokens, name)
        if kept is not None:
            known[name] = kept
    unknown = [name for name in names if name not in known]
    if unknown:
        try:
            reference = _opened(check)
            if reference is None:
                return
            known |= site_differences(model, reference, n_tokens, unknown)
        except NoReferenceError as error:
            logging.getLogger("tl_persona").info("%s are not compared: %s", ", ".join(unknown), error)
            return
    for name, verdict in known.items():
        if check.verdicts is not None and name in unknown:
            check.verdicts.put(n_tokens, verdict, name)
        if not verdict.holds:
            raise mismatch(model, verdict)
        check.sites.add(name)


def _compare_at(model: HookedModel, check: Check, n_tokens: int) -> None:
    known = None if check.verdicts is None else check.verdicts.get(n_tokens)
    if known is None:
        try:
            reference = _opened(check)
            assert reference is not None
            known = difference(model, reference, n_tokens)
        except NoReferenceError as error:
            check.reference, check.reopen, check.reason = None, None, str(error)
            return
        if check.verdicts is not None:
            check.verdicts.put(n_tokens, known)
    if not known.holds:
        raise mismatch(model, known)
    check.compared.append(n_tokens)


def mismatch(model: HookedModel, seen: Difference) -> ModelMismatchError:
    """The error about a model that differs."""
    kind, releases = type(model).__name__, software_versions()
    return ModelMismatchError(
        f"the {kind} of {seen.reference} that TransformerLens {releases['transformer-lens']} makes is another function "
        f"than the model of transformers {releases['transformers']}: {seen.hook} differs by {seen.worst:.2g} of its "
        f"length (allowed: {seen.allowed:.0e}) on {seen.n_tokens} tokens. Use another kind or another release of "
        "TransformerLens; check=False uses it as it is, and says so in what is saved"
    )


def checked(
    model: HookedModel,
    reference: Reference | None,
    reason: str = "",
    *,
    verdicts: VerdictFile | None = None,
    reopen: Callable[[], Any] | None = None,
    keep: bool = True,
    after: HookedModel | None = None,
) -> None:
    """Compare a model that was just made, and remember what it can be compared with later.

    Args:
        model: The hooked model.
        reference: The transformers model; None where there is none.
        reason: Why there is none.
        verdicts: Where verdicts are kept.
        reopen: Loads the transformers model again.
        keep: Whether the reference shares its weights with the model, and so may be kept.
        after: A model made before of the same modules with other weights, whose verdicts hold here too.

    Raises:
        ModelMismatchError: It differs.
    """
    lengths = () if reference is None else reference.lengths
    check = Check(reference, reason, lengths, verdicts=verdicts, reopen=reopen)
    if after is not None:
        check.compared = [*known_check(after).compared]
    remember_check(model, check)
    require_same(model)
    if not keep:
        check.reference = None
    if check.reason:
        logging.getLogger("tl_persona").info("not compared with transformers: %s", check.reason)
