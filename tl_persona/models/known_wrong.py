"""Classes of TransformerLens that give wrong numbers for an architecture, by release, as far as it is known.

For vectors that are stored already: what is loaded today is compared with its transformers model when it is loaded. A
vector whose notes say that it was compared is right, whatever stands here. Nothing is raised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownWrong:
    """One class whose residuals are not those of the transformers model.

    Attributes:
        model_class: `TransformerBridge` or `HookedTransformer`.
        release: How the versions of TransformerLens begin that it was measured with.
        architecture: The model's class in transformers.
        error: The largest relative error of a block's residuals, measured in float32 on a small random model.
    """

    model_class: str
    release: str
    architecture: str
    error: float


KNOWN_WRONG = (
    KnownWrong("TransformerBridge", "3.9.", "CohereForCausalLM", 0.28),
    KnownWrong("TransformerBridge", "3.9.", "Cohere2ForCausalLM", 0.33),
    KnownWrong("TransformerBridge", "3.9.", "DeepseekV3ForCausalLM", 0.44),
    KnownWrong("TransformerBridge", "3.9.", "HunYuanDenseV1ForCausalLM", 0.052),
    KnownWrong("HookedTransformer", "3.9.", "Phi3ForCausalLM", 0.9),
    KnownWrong("HookedTransformer", "3.9.", "BloomForCausalLM", 0.13),
)
"""Wrong whatever a checkpoint's configuration says; faults of single configurations cannot be told from a vector."""


def known_wrong(notes: Mapping[str, Any]) -> KnownWrong | None:
    """What is known to be wrong with a vector, by the notes of its provenance; None where nothing is.

    Args:
        notes: `Provenance.notes`; `model_class`, `architecture`, `transformer-lens` and `check` are looked at.

    Example:
        >>> notes = {"model_class": "HookedTransformer", "architecture": "Phi3ForCausalLM", "transformer-lens": "3.9.0"}
        >>> known_wrong(notes).error
        0.9
        >>> known_wrong(notes | {"check": "compared with transformers"}) is None
        True
        >>> known_wrong(notes | {"transformer-lens": "4.3.0"}) is None
        True
    """
    if str(notes.get("check", "")).startswith("compared"):
        return None
    named = notes.get("model_class"), notes.get("architecture")
    release = str(notes.get("transformer-lens", ""))
    found = (each for each in KNOWN_WRONG if (each.model_class, each.architecture) == named)
    return next((each for each in found if release.startswith(each.release)), None)
