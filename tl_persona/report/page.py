"""The report as one HTML page that needs no network: markup, style, script, data and plotly itself in one file.

A content security policy allows the page's own two scripts, by their digests, and no request at all. Everything that
comes from data is escaped or set as text. The page's foot says what the vectors were computed from, as their files
record it.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from tl_persona import __version__
from tl_persona.errors import InputError
from tl_persona.files import make_folder, write_atomically
from tl_persona.provenance import Provenance
from tl_persona.report.data import NONE, STEPS, Attributes, collection_data, figure_data, matrices_of
from tl_persona.report.layers import best_of, layer_profile_figure
from tl_persona.report.style import graph_objects
from tl_persona.report.survey import Collection, Survey, survey
from tl_persona.vectors.vector_set import SteeringVectorSet

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
        recorded.revision or recorded.weights_digest or _NOT_RECORDED,
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


_HERE = Path(__file__).parent


def write_report(source: str | Path, output: str | Path, *, attributes: Attributes | None = None) -> Path:
    """Write one self-contained HTML page about the persona vectors and steering vectors under a path.

    The same files make the same page, byte for byte.

    Args:
        source: The root of a store, the folder of one model in it, or the folder of a steering vector set.
        output: The page; written whole or not at all.
        attributes: By persona id what is known of her, to colour the map by; `Persona.persona` is such a mapping.

    Returns:
        The file written.

    Raises:
        NotStoredError: There are no vectors.
        CorruptFileError: A file is truncated or altered.
        StoreError: A file cannot be read, or the page not be written.
        InputError: The page is to be written where a folder is.
        MissingDependencyError: plotly is not installed.

    Example:
        >>> import tempfile, torch
        >>> from tl_persona.store import PersonaVectorStore
        >>> with tempfile.TemporaryDirectory() as root, PersonaVectorStore("org/model", root) as store:
        ...     _ = store.save("templated", "ada", "Ada", torch.ones(2, 3), ["q1"])
        ...     write_report(root, f"{root}/report.html").name
        'report.html'
    """
    graph_objects()
    file = Path(output).expanduser()
    if file.is_dir():
        raise InputError(f"{file} is a folder: name the file to write, such as {file / 'report.html'}")
    page = page_of(survey(source), attributes or {})
    make_folder(file.parent)
    write_atomically(file, page.encode("utf-8", "replace"))
    return file


def page_of(found: Survey, attributes: Attributes) -> str:
    """The page about what was found.

    Raises:
        StoreError: A file cannot be read or trusted.
        MissingDependencyError: plotly is not installed.
    """
    graph_objects()
    matrices = matrices_of(found.collections)
    drawn = [collection_data(collection, attributes, matrices) for collection in found.collections]
    profiles = [
        {"id": f"set-{i}", "figure": figure_data(layer_profile_figure(vectors))}
        for i, (_, vectors) in enumerate(found.sets)
        if len(vectors)
    ]
    data = {"collections": drawn, "profiles": profiles, "none": NONE, "steps": STEPS}
    scripts = [import_module("plotly.offline").get_plotlyjs(), (_HERE / "page.js").read_text(encoding="utf-8")]
    models = dict.fromkeys([each.model for each in found.collections] + [str(v.model_name) for _, v in found.sets])
    title = f"Vectors of {', '.join(models)}"
    parts = [
        *_head(title, scripts),
        f"<body><a class='skip' href='#content'>Skip to the figures</a><header><h1>{escape(title)}</h1>",
        f"<p class='dim'>{escape(_summary(found))}</p></header>",
        "<noscript><p>The figures need JavaScript; the tables of what is here do not.</p></noscript>",
        "<main id='content'>",
        *(_inventory(found.collections) if found.collections else ()),
        (_HERE / "personas.html").read_text(encoding="utf-8") if found.collections else "",
        *_steering(found.sets),
        "</main>",
        *provenance_parts(found),
        f"<script type='application/json' id='data'>{_json(data)}</script>",
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "".join(parts)


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table with its caption; the first cell of a row is its heading, numbers stand to the right."""

    def cell(value: Any, index: int) -> str:
        kind = " class='number'" if isinstance(value, int | float) else ""
        text = escape(f"{value:,}" if isinstance(value, int) else str(value))
        return f"<td{kind}>{text}</td>" if index else f"<th scope='row'{kind}>{text}</th>"

    head = "".join(f"<th scope='col'>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(cell(value, i) for i, value in enumerate(row))}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it, in a box that scrolls; the keyboard reaches both."""
    return (
        f"<details><summary>{escape(summary)}</summary>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(summary)}'>{content}</div></details>"
    )


def _head(title: str, scripts: Sequence[str]) -> list[str]:
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    return [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<link rel='icon' href='data:,'>",
        f"<title>{escape(title)}</title><style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head>",
    ]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _json(data: Any) -> str:
    """JSON in which nothing ends a script element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(found: Survey) -> str:
    personas = len({persona_id for each in found.collections for persona_id in each.persona_ids})
    told = []
    if found.collections:
        strategies = {each.strategy for each in found.collections}
        variants = {each.variant for each in found.collections}
        told.append(
            f"Persona vectors of {_count(personas, 'persona')}: {_count(len(variants), 'prompt variant')} "
            f"({', '.join(sorted(variants))}) and {_count(len(strategies), 'mask strategy', 'mask strategies')} "
            f"({', '.join(sorted(strategies))})."
        )
    if found.sets:
        names = ", ".join(vectors.behavior for _, vectors in found.sets)
        told.append(f"Steering vectors for {_count(len(found.sets), 'behaviour')}: {names}.")
    return " ".join(told)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _inventory(collections: Sequence[Collection]) -> list[str]:
    rows = []
    by_persona: dict[str, tuple[str, list[str]]] = {}
    for each in collections:
        layers, width = each.store.load(each.variant, each.persona_ids[0]).shape
        counts = [each.n_samples(persona_id) for persona_id in each.persona_ids]
        known = sorted({count for count in counts if count is not None})
        samples = "not recorded" if not known else f"{known[0]:,}" + (f" to {known[-1]:,}" if known[1:] else "")
        rows.append((each.model, each.strategy, each.variant, len(each.persona_ids), samples, layers, width))
        for persona_id, name, count in zip(each.persona_ids, each.names, counts, strict=True):
            held = by_persona.setdefault(persona_id, (name, []))
            held[1].append(f"{each.strategy}/{each.variant} ({'?' if count is None else count})")
    headings = ("model", "mask strategy", "variant", "personas", "questions a persona", "layers", "d_model")
    told = "Personas, and the strategies and variants stored of each, with the number of questions"
    people = [(persona_id, name, ", ".join(held)) for persona_id, (name, held) in sorted(by_persona.items())]
    return [
        "<section aria-labelledby='here'><h2 id='here'>What is here</h2>",
        table("Stored persona vectors", headings, rows),
        folded(f"The {_count(len(people), 'persona')} by id", table(told, ("id", "name", "stored"), people)),
        "</section>",
    ]


def _steering(sets: Sequence[tuple[str, SteeringVectorSet]]) -> list[str]:
    if not sets:
        return []
    parts = ["<section aria-labelledby='steering'><h2 id='steering'>Steering vectors</h2>"]
    for i, (folder, vectors) in enumerate(sets):
        parts.append(f"<h3 id='set-{i}-title'>{escape(vectors.behavior)}</h3>")
        parts.append(f"<p>{escape(_about(folder, vectors))}</p>")
        if not len(vectors):
            continue
        label = f"Lines by layer for {vectors.behavior}; the table below has the numbers"
        parts.append(
            f"<figure aria-labelledby='set-{i}-title'>"
            f"<div id='set-{i}' class='plot' role='img' aria-label='{escape(label)}'></div>"
            "<figcaption>Bands are 95 % intervals from resampling the pairs. AUC and d' come from pairs that the "
            "direction was not fitted on; norms grow with depth whatever the pairs.</figcaption></figure>"
        )
        layers = escape(f"Layers of {vectors.behavior}")
        parts.append(
            "<details open><summary>Table of the layers</summary>"
            f"<div class='scroll' tabindex='0' role='region' aria-label='{layers}'>{vectors.summary()._repr_html_()}"
            "</div></details>"
        )
    return [*parts, "</section>"]


def _about(folder: str, vectors: SteeringVectorSet) -> str:
    where = f"{_count(len(vectors), 'layer')} of {vectors.model_name}" + (f", in {folder}" if folder != "." else "")
    if not len(vectors):
        return f"An empty set, in {folder}."
    try:
        best, why = best_of(vectors)
    except InputError as error:
        return f"{where}. No layer is chosen: {error}."
    pairs = best.metadata.get("num_pairs")
    told = "" if pairs is None else f" From {pairs} pairs"
    position = best.metadata.get("token_position")
    told += f", token position {position}." if told and position is not None else "." if told else ""
    return f"{where}.{told} Chosen: layer {best.layer_index} ({best.hook_name}, norm {best.norm:.4g}), by {why}."
