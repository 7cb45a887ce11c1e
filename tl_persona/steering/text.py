"""A text with every token shaded by its projection on a vector: which words a direction responds to."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_persona.display import Piece, TokenView, token_texts
from tl_persona.errors import InputError
from tl_persona.models.facts import HookedModel
from tl_persona.prompts.prompt import Prompt
from tl_persona.steering.monitor import HasDirection, monitor

if TYPE_CHECKING:
    from rich.console import Group

LESS, MORE = (0, 114, 178), (213, 94, 0)
"""Blue and vermilion of Okabe and Ito: told apart with any common colour blindness, dark text readable on both."""
STRONGEST = 0.7  # of the colour, where shading ends: text on it stays readable
_QUANTILE = 0.95  # so that one token far out leaves the others their shades


@dataclass(frozen=True, eq=False)
class TextProjection:
    """The projection of every token of a text on one direction, to be shown in a terminal or a notebook.

    Attributes:
        text: The text that was run.
        tokens: For each token the characters before it that no token has, and its own.
        values: The projections on the direction at norm 1, in the activations' units, shape (pos,).
        name: The direction's name.
        hook_name: Where the activations are from.
        zero: The projection that is left white.
        limit: How far from `zero` shading ends.
    """

    text: str
    tokens: tuple[tuple[str, str], ...]
    values: Float[Tensor, "pos"]
    name: str
    hook_name: str
    zero: float
    limit: float

    def view(self) -> TokenView:
        """The text alone, shaded."""
        pieces = []
        for (gap, token), value in zip(self.tokens, self.values.tolist(), strict=True):
            if gap:
                pieces.append(Piece(gap))
            red, green, blue = self._colour(value)
            style = f"#1b1b1b on #{red:02x}{green:02x}{blue:02x}"
            pieces.append(Piece(token, style, f"background:rgb({red},{green},{blue})", f"{value:+.3g}"))
        return TokenView(tuple(pieces))

    def extremes(self, count: int = 3) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """The tokens with the highest projections, highest first, and with the lowest, lowest first."""
        order = self.values.argsort(stable=True).tolist()
        told = [(self.tokens[index][1], float(self.values[index])) for index in order]
        return told[::-1][:count], told[:count]

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._title(), "bold"), self.view().__rich__(), Text(self._legend(), "dim"))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row' style='text-align:left'><code>{escape(token)}</code></th><td>{value:+.4g}</td></tr>"
            for (_, token), value in zip(self.tokens, self.values.tolist(), strict=True)
        )
        return (
            f"<div><strong>{escape(self._title())}</strong>{self.view()._repr_html_()}"
            f"<p style='color:#555'>{escape(self._legend())}</p><details><summary>Every token</summary>"
            f"<table><thead><tr><th scope='col'>token</th><th scope='col'>projection</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></details></div>"
        )

    def _title(self) -> str:
        return f"projection on {self.name} at {self.hook_name}"

    def _legend(self) -> str:
        def words(found: list[tuple[str, float]]) -> str:
            return ", ".join(f"{token.strip() or repr(token)} {value:+.3g}" for token, value in found)

        highest, lowest = self.extremes()
        scale = f"orange above {self.zero:.3g}, blue below, full at {self.limit:.3g} from it"
        return f"{scale}. Highest: {words(highest)}. Lowest: {words(lowest)}."

    def _colour(self, value: float) -> tuple[int, ...]:
        away = value - self.zero
        share = STRONGEST * min(1.0, abs(away) / self.limit) if self.limit > 0 else 0.0
        return tuple(round(255 + share * (end - 255)) for end in (MORE if away > 0 else LESS))


def project_text(
    model: HookedModel,
    text: str | Prompt,
    vector: HasDirection,
    *,
    tokenizer: Any = None,
    zero: float | None = None,
) -> TextProjection:
    """Run a text once and project every token's activation at the vector's hook on the vector.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`, as from `load_model`.
        text: Raw text, tokenized with the tokenizer's own special tokens; or a rendered chat, as from `prepare_inputs`,
            which is run as it is.
        vector: A `SteeringVector`, or anything with `behavior`, `hook_name` and `vector`.
        tokenizer: A fast tokenizer in place of the model's own; not used for a rendered chat.
        zero: The projection that is left white; None takes the median of the text's own. Activations lie far from zero
            in most directions, so what tells tokens apart is how far they are from each other. The first token, far
            out in most models, counts for neither this nor the scale.

    Raises:
        HookError: The model has no such hook.
        InputError: The text is empty, the tokenizer has no offsets, the vector has another width or is zero.

    Example:
        view = project_text(model, "I am sorry, but I cannot help with that.", vectors.get_best())
        rich.print(view)    # in a terminal; in a notebook, `view` as the last line of a cell
    """
    ids, offsets, rendered = _tokens(model, text, tokenizer)
    if not len(ids):
        raise InputError("the text has no tokens: there is nothing to project")
    runs: Any = model
    device = next(runs.parameters()).device
    with torch.no_grad(), monitor(model, {vector.behavior: (vector.hook_name, vector.vector)}) as seen:
        runs(ids[None].to(device))
    ((values,),) = (found for found in seen.texts(vector.behavior))
    rest = values[1:] if len(values) > 1 else values
    middle = float(rest.median()) if zero is None else float(zero)
    limit = float((rest - middle).abs().quantile(_QUANTILE))
    return TextProjection(
        rendered, tuple(token_texts(rendered, offsets)), values, vector.behavior, vector.hook_name, middle, limit
    )


def _tokens(model: HookedModel, text: str | Prompt, tokenizer: Any) -> tuple[Tensor, list[tuple[int, int]], str]:
    if isinstance(text, Prompt):
        return text.input_ids, text.offset_mapping, text.prompt_text
    reader = tokenizer if tokenizer is not None else model.tokenizer
    if not getattr(reader, "is_fast", False):
        raise InputError("the tokenizer gives no offsets: pass a fast one as tokenizer=")
    encoded: Mapping[str, Any] = reader(text, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    return ids, [(int(start), int(end)) for start, end in encoded["offset_mapping"]], text
