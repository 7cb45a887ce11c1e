"""Finds the tokens that cover a range of characters.

One rule for every strategy and tokenizer: a token belongs to a content when it overlaps it by at least one character,
so a token that straddles the border of two contents belongs to both. A token without
characters of its own belongs to it where it lies between two tokens that do. That the offsets are
right is checked by decoding the tokens.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
from jaxtyping import Bool, Int

from tl_persona.errors import PromptError
from tl_persona.prompts.prompt import NO_SPAN, PromptSpans, Span
from tl_persona.prompts.template import CharRange

Offsets = Int[np.ndarray, "token 2"]
"""For each token its half-open range of characters."""


def overlapping(offsets: Offsets, start: int, end: int) -> Bool[np.ndarray, "token"]:
    """Which tokens overlap a range of characters.

    Example:
        >>> overlapping(np.array([[0, 2], [2, 2], [2, 5], [5, 6]]), 1, 5).tolist()
        [True, False, True, False]
    """
    return np.asarray(np.maximum(offsets[:, 0], start) < np.minimum(offsets[:, 1], end))


def _covered(offsets: Offsets, start: int, end: int) -> Bool[np.ndarray, "char"]:
    """Which characters of a range some token has."""
    edges = np.zeros(end - start + 1, dtype=np.int64)
    np.add.at(edges, np.clip(offsets[:, 0], start, end) - start, 1)
    np.add.at(edges, np.clip(offsets[:, 1], start, end) - start, -1)
    return np.asarray(np.cumsum(edges[:-1]) > 0)


_PROBE = "A b  C\n\n d é"
_COMPOSABLE = "e\u0301 \ufb01"  # a letter and its accent; two letters in one
_FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")


class TokenAligner:
    """Finds and checks the token spans of texts that one tokenizer has encoded.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special_ids = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
        self._control_ids: dict[tuple[str, ...], np.ndarray] = {}
        self._checked: set[tuple[str, str, str, bytes]] = set()
        # Others lower-case, normalize or have unknown words: what they decode to is compared after the same loss.
        self._keeps_text = self._decode(self._encode(_PROBE)) == _PROBE
        composed = self._decode(self._encode(_COMPOSABLE))
        forms = (form for form in _FORMS if self._keeps_text and composed == normalize(form, _COMPOSABLE))
        self._form = next(forms, None)
        # Runs of white space, which some tokenizers add too, are text wherever they stand.
        unmarked = {index: token.content for index, token in added.items() if not token.special}
        self._added = {index: token for index, token in unmarked.items() if token.strip()}

    def special(
        self, text: str, ids: Int[np.ndarray, "token"], offsets: Offsets, written: tuple[str, ...]
    ) -> Bool[np.ndarray, "token"]:
        """Which tokens are control tokens: special ones, and added ones that stand in what the template has written.

        The unknown token is one only where the text spells it out.
        """
        if written not in self._control_ids:
            roles = {index for index, token in self._added.items() if any(token in piece for piece in written)}
            self._control_ids[written] = np.array(sorted(self._special_ids | roles), dtype=np.int64)
        special = np.isin(ids, self._control_ids[written])
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        if unknown is not None:
            for index in np.flatnonzero(ids == unknown):
                special[index] = text[slice(*offsets[index])].strip() == str(self._tokenizer.unk_token)
        return special

    def span(
        self,
        text: str,
        char_range: CharRange,
        ids: Int[np.ndarray, "token"],
        offsets: Offsets,
        special: Bool[np.ndarray, "token"],
    ) -> Span:
        """The tokens of one content.

        Raises:
            PromptError: No token covers it, one of its tokens is a control token, or the tokenizer's offsets do not
                tell for certain which tokens are its own.
        """
        start, end = char_range
        mine = overlapping(offsets, start, end)
        for index in np.flatnonzero(mine & special):
            left, right = offsets[index]
            shared = text[max(left, start) : min(right, end)]
            if shared.strip() or (start <= left and right <= end):
                raise PromptError(
                    f"contains {text[left:right]!r}, which the tokenizer reads as a control token: rephrase it"
                )
            mine[index] = False  # the template's own token, of the kind that swallows white space beside it
        inside = np.flatnonzero(mine)
        drops_white_space = not self._keeps_text or self._trims_offsets()
        lost = [text[place] for place in start + np.flatnonzero(~_covered(offsets, start, end))]
        # A mark that was composed with its letter has no range of its own; decoding shows whether it is there.
        lost = [c for c in lost if (self._form is None if c.strip() else not drops_white_space)]
        if lost or not len(inside):
            raise PromptError(
                f"is {_short(text[start:end])}, but the tokenizer has no token for "
                f"{repr(lost[0]) if lost else 'any of it'}: change the text"
            )
        span = Span(start, end, int(inside[0]), int(inside[-1]) + 1)
        others = offsets[span.token_start : span.token_end][~mine[span.token_start : span.token_end]]
        if (others[:, 0] < others[:, 1]).any():
            raise PromptError("has tokens of other text among its own: the tokenizer's offsets are out of order")
        covered = offsets[mine]
        if (covered[:, 0].min() > start or covered[:, 1].max() < end) and self._trims_offsets():
            raise PromptError(
                "begins or ends with white space, and this tokenizer leaves spaces out of its offsets, so their tokens "
                "cannot be told apart from the template's: strip the text"
            )
        self.check_decoding(text, span, ids, offsets)
        return span

    def check_decoding(self, text: str, span: Span, ids: Int[np.ndarray, "token"], offsets: Offsets) -> None:
        """Checks that the tokens of a span decode to the text that their offsets claim.

        Raises:
            PromptError: They do not, even allowing for what the tokenizer normalizes.
        """
        own_ids, own_offsets = ids[span.token_start : span.token_end], offsets[span.token_start : span.token_end]
        start, end = own_offsets[:, 0].min(), own_offsets[:, 1].max()
        if self._form is not None:  # a mark at an edge may have no range of its own
            start, end = min(start, span.char_start), max(end, span.char_end)
        before, own, behind = (
            self._composed(text[left:right]) for left, right in pairwise((start, span.char_start, span.char_end, end))
        )
        covered = self._composed(text[start:end])
        key = (before, own, behind, own_ids.tobytes())  # the persona of a run is the same in every sample
        if key in self._checked:
            return
        decoded = self._decode(own_ids.tolist())
        if "\ufffd" in decoded and "\ufffd" not in covered:
            # Bytes of a broken character: of the one beyond the border, or of one the vocabulary cannot spell.
            same = re.fullmatch(f" *{_broken(before, 0)}{re.escape(own)}{_broken(behind, -1)} *", decoded) is not None
        elif self._keeps_text:
            same = decoded.strip(" ") == covered.strip(" ")  # prefix spaces come and go, with trimmed offsets too
        else:
            same = _squeezed(decoded) == _squeezed(self._decode(self._encode(covered)))
        if not same:
            raise PromptError(
                f"is {_short(own)}, but its tokens decode to {_short(decoded)}: the tokenizer has no tokens for "
                "some of its characters, or gives wrong offsets: change the text or the tokenizer"
            )
        self._checked.add(key)

    def added_tokens(self, span: Span, ids: Int[np.ndarray, "token"]) -> tuple[str, ...]:
        """Entries among a span's tokens that were added to the vocabulary without being marked special."""
        found = (self._added.get(index) for index in ids[span.token_start : span.token_end].tolist())
        return tuple(dict.fromkeys(token for token in found if token))

    def _composed(self, text: str) -> str:
        """A text in the normal form that this tokenizer brings texts into, if it keeps them otherwise."""
        return text if self._form is None else normalize(self._form, text)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _trims_offsets(self) -> bool:
        processor = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "post_processor", None)
        return processor is not None and b'"trim_offsets":true' in processor.__getstate__()


def check_spans(
    text: str,
    spans: PromptSpans,
    ids: Int[np.ndarray, "token"],
    offsets: Offsets,
    special: Bool[np.ndarray, "token"],
    aligner: TokenAligner | None,
) -> None:
    """Checks that spans lie in order inside a tokenized text and have exactly the tokens that overlap them.

    Args:
        text: The rendered chat.
        spans: What is to be checked; the system prompt's may be `NO_SPAN`.
        ids: Token ids.
        offsets: One row a token.
        special: True at control tokens.
        aligner: Decodes the tokens too, where it is given.

    Raises:
        PromptError: Something does not hold.
    """
    n_pos = len(ids)
    has_text = offsets[:, 0] < offsets[:, 1]
    before = NO_SPAN
    for name, span in zip(PromptSpans._fields, spans, strict=True):
        if name == "template" and span == NO_SPAN:
            continue
        if not (0 <= span.char_start < span.char_end <= len(text) and 0 <= span.token_start < span.token_end <= n_pos):
            raise PromptError(f"the {name} span {tuple(span)} is empty or leaves the prompt")
        if span.char_start < before.char_end:
            raise PromptError(f"the {name} span {tuple(span)} begins before the span in front of it ends")
        inside = np.zeros(n_pos, dtype=bool)
        inside[span.token_start : span.token_end] = True
        if (inside & special).any():
            raise PromptError(f"the {name} span {tuple(span)} holds a control token")
        mine = overlapping(offsets, span.char_start, span.char_end)
        for left, right in offsets[mine & special]:
            if text[max(left, span.char_start) : min(right, span.char_end)].strip():
                raise PromptError(f"the {name} span {tuple(span)} holds a control token")
        mine &= ~special
        if (mine != inside)[has_text].any() or not (mine[span.token_start] and mine[span.token_end - 1]):
            raise PromptError(f"the {name} span {tuple(span)} has not exactly the tokens that overlap its characters")
        if aligner is not None:
            aligner.check_decoding(text, span, ids, offsets)
        before = span


def _broken(text: str, outermost: int) -> str:
    """A pattern for a text of whose outermost character there may be only some bytes, which decode to no character."""
    if not text:
        return ""
    edge = f"(?:{re.escape(text[outermost])}|\ufffd{{1,3}})"
    return edge + re.escape(text[1:]) if outermost == 0 else re.escape(text[:-1]) + edge


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
