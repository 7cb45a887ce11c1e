"""Selected tokens whose activation is far longer than those around them: counted and reported, never removed.

Many models give a few tokens, such as a delimiter, a norm of ten to two hundred times that of the others in the same
text. One of them among the tokens of a mean outweighs all the rest, and says little of the text. Token 0 of raw text is
the one that every text has, and is left out by `prompts`' work; this finds the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_persona.tensors import TokenMask, TokenNorms

OUTLYING = 10.0
"""Times the median norm of a text: ordinary tokens of one layer lie within a factor of about three."""

NOT_CHECKED = "not checked"
"""In the metadata of vectors from a backend that does not send norms back."""


@dataclass(frozen=True)
class Extreme:
    """The selected token that stands out most.

    Attributes:
        sample: Index of the sample.
        position: Of the token.
        hook: Index of the hook.
        ratio: Its norm, in medians of the text's norms at that hook.
    """

    sample: int
    position: int
    hook: int
    ratio: float


class OutlierTally:
    """Counts outlying tokens sample by sample; what it keeps does not grow with their number.

    An outlying token is a selected one whose norm at a hook is `OUTLYING` times the median over the text's tokens up to
    the last selected one, or more. Of two middle norms the lower is the median.

    Args:
        n_hooks: Number of hooks.
        expects_first: Whether token 0 was asked for: it is counted, and no reason to warn.

    Example:
        >>> tally = OutlierTally(1)
        >>> norms = torch.tensor([[250.0, 1.0, 1.0, 3.0, 16.0]])
        >>> tally.add(0, norms, torch.tensor([False, True, False, True, True]))
        >>> tally.as_metadata(0)
        {'tokens': 0, 'texts': 0, 'largest_share': 0.8}
        >>> tally.add(1, norms, torch.tensor([True, False, False, False, True]))
        >>> found = tally.as_metadata(0)
        >>> found["tokens"], found["texts"], round(found["largest_share"], 3)
        (1, 1, 0.94)
        >>> tally.worst.sample, tally.worst.position, tally.worst.hook, round(tally.worst.ratio, 1)
        (1, 0, 0, 83.3)
    """

    def __init__(self, n_hooks: int, *, expects_first: bool = False) -> None:
        self._expects_first = expects_first
        self._tokens = torch.zeros(n_hooks, dtype=torch.long)
        self._texts = torch.zeros_like(self._tokens)
        self._unexpected = torch.zeros_like(self._tokens)
        self._shares = torch.full((n_hooks,), -1.0, dtype=torch.float64)
        self._unchecked = False
        self.worst: Extreme | None = None

    def add(self, sample: int, norms: TokenNorms | None, mask: TokenMask) -> None:
        """Counts one sample.

        Args:
            sample: Its index, for `worst`.
            norms: Of all its tokens, at least up to the last selected one; None where they are not known.
            mask: The tokens that are selected.
        """
        if norms is None:
            self._unchecked = True
            return
        places = mask.nonzero()[:, 0]
        ran = norms[:, : int(places[-1]) + 1].double()
        selected = ran[:, places]
        medians = ran.nanmedian(dim=1, keepdim=True).values
        outlying = (selected >= OUTLYING * medians) & (selected > 0)
        self._tokens += outlying.sum(dim=1)
        self._texts += outlying.any(dim=1)
        if len(places) > 1:  # one token alone is all of its mean, and that says nothing
            self._shares = torch.fmax(self._shares, (selected / selected.sum(dim=1, keepdim=True)).amax(dim=1))
        if self._expects_first:
            outlying &= places != 0
        self._unexpected += outlying.sum(dim=1)
        self._look_for_the_worst(sample, places, outlying, selected / medians)

    def _look_for_the_worst(
        self,
        sample: int,
        places: Int[Tensor, "selected"],
        outlying: Bool[Tensor, "hook selected"],
        ratios: TokenNorms,
    ) -> None:
        if not bool(outlying.any()):
            return
        hook, column = divmod(int(torch.where(outlying, ratios, 0).argmax()), len(places))
        ratio = float(ratios[hook, column])
        if self.worst is None or ratio > self.worst.ratio:
            self.worst = Extreme(sample, int(places[column]), hook, ratio)

    @property
    def hooks(self) -> list[int]:
        """Indices of the hooks at which a token is outlying that nobody asked for."""
        return [] if self._unchecked else self._unexpected.nonzero()[:, 0].tolist()

    @property
    def most(self) -> int:
        """How many such tokens the hook has that has most of them."""
        return int(self._unexpected.max())

    def largest_share(self, hook: int) -> float | None:
        """Largest part of one token in the sum of norms of one text's selected tokens; None where each text has one."""
        share = float(self._shares[hook])
        return None if share < 0 else share

    def as_metadata(self, hook: int) -> dict[str, Any] | str:
        """What a steering vector's metadata says under `outliers`; `NOT_CHECKED` where norms were not known."""
        if self._unchecked:
            return NOT_CHECKED
        counts = {"tokens": int(self._tokens[hook]), "texts": int(self._texts[hook])}
        return {**counts, "largest_share": self.largest_share(hook)}
