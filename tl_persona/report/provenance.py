"""The foot of the page: what the vectors were computed from, as their files record it."""

from collections import Counter
from collections.abc import Sequence
from html import escape

from tl_persona import __version__
from tl_persona.provenance import Provenance
from tl_persona.report.survey import Survey

_NOT_RECORDED = "not recorded"


def provenance_parts(found: Survey) -> list[str]:
    """The page's footer, in HTML."""
    rows = []
    for each in found.collections:
        recorded = [each.provenance(persona_id) for persona_id in each.persona_ids]
        rows += _rows(f"{each.model} · {each.strategy} · {each.variant}", "persona", recorded)
    for folder, vectors in found.sets:
        what = vectors.behavior if folder == "." else f"{vectors.behavior} ({folder})"
        rows += _rows(what, "layer", [vector.provenance for vector in vectors])
    headings = ("vectors", "how many", "model", "revision", "dtype", "weights", "tokens", "hooks")
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in headings)
    lines = "".join(
        f"<tr><th scope='row'>{escape(what)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        f"<tr><td colspan='{len(headings)}' class='dim'>{escape(notes)}</td></tr>"
        for what, *cells, notes in rows
    )
    return [
        "<footer><h2 id='provenance'>Where the numbers come from</h2>",
        "<div class='scroll' tabindex='0' role='region' aria-labelledby='provenance'><table>",
        "<caption>What the files record of their own making; rows that differ in anything are apart</caption>",
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>",
        f"<p class='dim'>Written by tl_persona {escape(__version__)}. This page holds everything it shows and asks the "
        "network for nothing. Figures are drawn by plotly.js (MIT licence).</p></footer>",
    ]


def _rows(what: str, unit: str, recorded: Sequence[Provenance | None]) -> list[tuple[str, ...]]:
    """One row for all that were made alike, whatever their hooks and texts."""
    hooks: dict[tuple[str, ...], list[str]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for one in recorded:
        facts = _facts(one)
        counts[facts] += 1
        hooks.setdefault(facts, []).extend(() if one is None else one.hook_names)
    return [
        (what, f"{count:,} {unit}{'' if count == 1 else 's'}", *facts[:-1], _range(hooks[facts]), facts[-1])
        for facts, count in counts.most_common()
    ]


def _facts(recorded: Provenance | None) -> tuple[str, ...]:
    if recorded is None:
        return (_NOT_RECORDED,) * 5 + ("",)
    return (
        recorded.model_name,
        recorded.revision or _NOT_RECORDED,
        recorded.dtype,
        recorded.weights,
        recorded.strategy,
        ", ".join(f"{key} {value}" for key, value in recorded.notes.items()),
    )


def _range(hooks: Sequence[str]) -> str:
    names = list(dict.fromkeys(hooks))
    if not names:
        return _NOT_RECORDED
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
