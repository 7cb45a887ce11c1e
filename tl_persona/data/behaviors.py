"""The eleven behaviours whose contrast pairs come with this package, and a function for each."""

import difflib
import json
from importlib import resources

from tl_persona.data.contrast import ContrastPairDataset, from_json
from tl_persona.errors import InputError

BEHAVIORS = (
    "refusal",
    "uncertainty",
    "tool_restraint",
    "instruction_hierarchy",
    "formality",
    "conciseness",
    "creativity",
    "assertiveness",
    "humor",
    "empathy",
    "technical_depth",
)
"""The behaviours `load_pairs` knows; their files are in `bundled/contrast`."""


def load_pairs(behavior: str) -> ContrastPairDataset:
    """The bundled pairs of one of `BEHAVIORS`.

    Raises:
        InputError: The behaviour is not bundled; the message has the nearest names.

    Example:
        >>> load_pairs("refusal").behavior
        'refusal'
    """
    if behavior not in BEHAVIORS:
        near = difflib.get_close_matches(str(behavior), BEHAVIORS, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"bundled are {', '.join(BEHAVIORS)}"
        raise InputError(f"no bundled contrast pairs for behavior {behavior!r}; {hint}")
    source = resources.files("tl_persona") / "data" / "bundled" / "contrast" / f"{behavior}.json"
    return from_json(json.loads(source.read_bytes()), f"bundled {behavior}.json")


def load_refusal_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side declines a request, the negative side helps."""
    return load_pairs("refusal")


def load_uncertainty_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side states calibrated doubt, the negative side asserts flatly."""
    return load_pairs("uncertainty")


def load_tool_restraint_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side does without an unneeded tool, the negative side reaches for it."""
    return load_pairs("tool_restraint")


def load_instruction_hierarchy_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side keeps the system's rule against the user, the negative side drops it."""
    return load_pairs("instruction_hierarchy")


def load_formality_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side is formal, the negative side casual."""
    return load_pairs("formality")


def load_conciseness_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side is brief, the negative side wordy."""
    return load_pairs("conciseness")


def load_creativity_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side is inventive, the negative side plain."""
    return load_pairs("creativity")


def load_assertiveness_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side is firm, the negative side defers."""
    return load_pairs("assertiveness")


def load_humor_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side is funny, the negative side serious."""
    return load_pairs("humor")


def load_empathy_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side meets the feeling, the negative side is procedural."""
    return load_pairs("empathy")


def load_technical_depth_pairs() -> ContrastPairDataset:
    """Bundled pairs: the positive side explains the mechanism, the negative side stays on the surface."""
    return load_pairs("technical_depth")


# The names under which rotalabs-steer has the same two sets.
get_refusal_pairs = load_refusal_pairs
load_hierarchy_pairs = load_instruction_hierarchy_pairs
