"""How personas are coloured by what is known of them: groups with a colour and a shape, or a scale of numbers.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; shapes say the same again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross")
GREY = "#767676"  # as light as text on white may be
MOST_GROUPS = 12
"""More groups than this nobody tells apart: the rarest are drawn as one."""
FEWEST_ON_A_SCALE = 5
"""Fewer different numbers than these are groups."""
NAMES = ("first_name", "last_name")
OTHER, UNKNOWN = "other", "not known"


@dataclass(frozen=True)
class Group:
    """Personas that are drawn alike.

    Attributes:
        label: What they have in common.
        members: Their positions.
        colour: A CSS colour.
        shape: A plotly symbol.
    """

    label: str
    members: tuple[int, ...]
    colour: str = COLOURS[0]
    shape: str = SHAPES[0]


@dataclass(frozen=True)
class Colouring:
    """One attribute of some personas, ready to be drawn.

    Attributes:
        title: The attribute.
        groups: Who is drawn alike; every persona is in one.
        values: The attribute of each persona in words.
        scale: For an attribute of numbers that of each persona, to be drawn on a scale of colours; None where it has
            none. Empty for any other attribute.
    """

    title: str
    groups: tuple[Group, ...]
    values: tuple[str, ...]
    scale: tuple[float | None, ...] = ()


def colouring(title: str, values: Sequence[Any]) -> Colouring:
    """Groups personas by one attribute.

    Args:
        title: The attribute.
        values: That of each persona; None where it is not known.

    Example:
        >>> [(group.label, group.members) for group in colouring("home", ["sea", "hill", "sea", None]).groups]
        [('sea', (0, 2)), ('hill', (1,)), ('not known', (3,))]
        >>> colouring("age", [20, 41, 33, 52, 60]).scale
        (20.0, 41.0, 33.0, 52.0, 60.0)
    """
    words = tuple(UNKNOWN if value is None else _in_words(value) for value in values)
    numbers = {value for value in values if _is_number(value)}
    missing = tuple(index for index, value in enumerate(values) if value is None)
    unknown = [Group(UNKNOWN, missing, GREY, "circle-open")] if missing else []
    if len(numbers) >= FEWEST_ON_A_SCALE and all(value is None or _is_number(value) for value in values):
        known = tuple(index for index, value in enumerate(values) if value is not None)
        scale = tuple(None if value is None else float(value) for value in values)
        return Colouring(title, (Group(title, known), *unknown), words, scale)
    given = {index: words[index] for index, value in enumerate(values) if value is not None}
    counts = Counter(given.values())
    named = [word for word, _ in counts.most_common()]
    if len(named) > MOST_GROUPS:
        named = named[: MOST_GROUPS - 1]
    groups = [
        Group(word, _where(given, [word]), COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)])
        for i, word in enumerate(named)
    ]
    rest = [word for word in counts if word not in named]
    if rest:
        groups.append(Group(f"{OTHER} ({len(rest)} values)", _where(given, rest), GREY, "circle"))
    return Colouring(title, (*groups, *unknown), words)


def colourings(persona_ids: Sequence[str], attributes: Mapping[str, Mapping[str, Any]]) -> list[Colouring]:
    """One colouring for each attribute in which these personas differ; first one in which all are alike.

    Args:
        persona_ids: Whom to colour, in order.
        attributes: By persona id what is known of her; personas without an entry are not known.
    """
    found = [Colouring("one colour", (Group("persona", tuple(range(len(persona_ids)))),), ("",) * len(persona_ids))]
    titles = dict.fromkeys(title for persona_id in persona_ids for title in attributes.get(persona_id, {}))
    for title in titles:
        values = [attributes.get(persona_id, {}).get(title) for persona_id in persona_ids]
        if title not in NAMES and len({_in_words(value) for value in values if value is not None}) > 1:
            found.append(colouring(title.replace("_", " "), values))
    return found


def _where(given: Mapping[int, str], wanted: Iterable[str]) -> tuple[int, ...]:
    chosen = set(wanted)
    return tuple(index for index, word in given.items() if word in chosen)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _in_words(value: Any) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Sequence):
        return ", ".join(map(str, value))
    return str(value)
