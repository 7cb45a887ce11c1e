"""Draws docs/images/token-norms.svg: the norm of the residual stream by token and block, of one text through SmolLM2.

Run `python docs/site/token_norms.py` where the demo model is installed.
"""

from html import escape
from math import log10
from pathlib import Path

import torch

from tl_persona import load_model

PICTURE = Path(__file__).resolve().parents[1] / "images" / "token-norms.svg"
TEXT = "The river rises in the hills to the north of the town and runs for forty miles before it reaches the sea."
CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 26, 11, 62, 30
DECADES = (1.5, 4.5)
"""Common logarithms of the norms of the lightest and the darkest cell."""


def colour(norm: float) -> str:
    """From pale yellow over red to near black, by the logarithm."""
    share = min(max((log10(norm) - DECADES[0]) / (DECADES[1] - DECADES[0]), 0), 1)
    stops = [(255, 250, 220), (240, 150, 60), (175, 30, 60), (40, 5, 40)]
    place = share * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def picture(norms: torch.Tensor, tokens: list[str]) -> str:
    """The drawing, of norms of shape (layer, pos)."""
    n_layers, n_tokens = norms.shape
    right, bottom = LEFT + n_tokens * CELL_WIDTH, TOP + n_layers * CELL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 92} {bottom + 66}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18">Norm of the output of each block, by token (SmolLM2-135M-Instruct)</text>',
        f'<text x="14" y="{(TOP + bottom) // 2}" transform="rotate(-90 14 {(TOP + bottom) // 2})">block</text>',
    ]
    for layer in range(n_layers):
        y = bottom - (layer + 1) * CELL_HEIGHT
        if layer % 5 == 0 or layer == n_layers - 1:
            parts.append(f'<text x="{LEFT - 6}" y="{y + 9}" text-anchor="end">{layer}</text>')
        for position, norm in enumerate(norms[layer].tolist()):
            x = LEFT + position * CELL_WIDTH
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" fill="{colour(norm)}"/>')
    for position, token in enumerate(tokens):
        x, y = LEFT + position * CELL_WIDTH + 16, bottom + 8
        parts.append(f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-55 {x} {y})">{escape(token)}</text>')
    for step, norm in enumerate((30, 100, 300, 1000, 3000, 10000, 30000)):
        y = bottom - (step + 1) * 22
        parts.append(f'<rect x="{right + 16}" y="{y}" width="18" height="22" fill="{colour(norm)}"/>')
        parts.append(f'<text x="{right + 40}" y="{y + 15}">{norm:,}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Run the text and write the picture."""
    model = load_model("smollm2")
    ids = torch.tensor(model.tokenizer(TEXT)["input_ids"])
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cached = model.run_with_cache(ids[None], names_filter=names)
    norms = torch.stack([cached[name][0].norm(dim=-1) for name in names])
    tokens = [model.tokenizer.decode([token]).strip() for token in ids.tolist()]
    PICTURE.write_text(picture(norms, tokens), encoding="utf-8")


if __name__ == "__main__":
    main()
