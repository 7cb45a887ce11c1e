"""Persona vectors and steering vectors through TransformerLens hook names.

The flow, which is also the order of the modules:

    samples -> prompts + spans -> masks -> plan -> backend -> reducers -> vectors -> store

- `samples` and `contrast`: personas with their questions, and contrast pairs: plain records.
- `prompts`: chats rendered by the tokenizer's own template, with proven spans of persona, question and answer.
- `masks`: which tokens count, by strategy, as `Bool[Tensor, "batch pos"]`.
- `hooks`: layers chosen by hook name.
- `plan`: samples cut into batches; pure, no model.
- `backends`: a plan run on a hooked model; for each sample and mask the mean of every hook.
- `reducers`, `statistics`, `directions`: means over samples, and how far to trust them.
- `vectors`, `store`: what is kept, with its provenance, as safetensors.
- `extraction`, `caa`, `steering`, `generation`, `cli`: the recipes that join them.

Importing this package loads neither torch nor TransformerLens; names are fetched when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BASELINE_PERSONA_ID": "samples",
    "BEHAVIORS": "contrast",
    "ContrastPair": "contrast",
    "ContrastPairDataset": "contrast",
    "ExtractionResult": "extraction",
    "Generation": "generation",
    "Intervention": "steering",
    "MaskStrategy": "masks",
    "Persona": "samples",
    "PersonaDataset": "samples",
    "PersonaVectorStore": "store",
    "PreparedInput": "prepared",
    "QAPair": "samples",
    "SteeringVector": "vectors",
    "SteeringVectorSet": "vectors",
    "TLPersonaError": "errors",
    "attach": "steering",
    "extract_activations": "extraction",
    "extract_caa_vector": "caa",
    "extract_caa_vectors": "caa",
    "generate": "generation",
    "get_model_config": "configs",
    "load_assertiveness_pairs": "contrast",
    "load_conciseness_pairs": "contrast",
    "load_creativity_pairs": "contrast",
    "load_empathy_pairs": "contrast",
    "load_formality_pairs": "contrast",
    "load_humor_pairs": "contrast",
    "load_instruction_hierarchy_pairs": "contrast",
    "load_model": "loading",
    "load_pairs": "contrast",
    "load_refusal_pairs": "contrast",
    "load_technical_depth_pairs": "contrast",
    "load_tool_restraint_pairs": "contrast",
    "load_uncertainty_pairs": "contrast",
    "merge_stores": "merging",
    "monitor": "steering",
    "prepare_inputs": "prepared",
    "project": "steering",
    "project_text": "projection",
    "resolve_hooks": "hooks",
    "run_extraction": "extraction",
    "verify": "verification",
    "write_report": "report",
}

__all__ = [
    "BASELINE_PERSONA_ID",
    "BEHAVIORS",
    "ContrastPair",
    "ContrastPairDataset",
    "ExtractionResult",
    "Generation",
    "Intervention",
    "MaskStrategy",
    "Persona",
    "PersonaDataset",
    "PersonaVectorStore",
    "PreparedInput",
    "QAPair",
    "SteeringVector",
    "SteeringVectorSet",
    "TLPersonaError",
    "attach",
    "extract_activations",
    "extract_caa_vector",
    "extract_caa_vectors",
    "generate",
    "get_model_config",
    "load_assertiveness_pairs",
    "load_conciseness_pairs",
    "load_creativity_pairs",
    "load_empathy_pairs",
    "load_formality_pairs",
    "load_humor_pairs",
    "load_instruction_hierarchy_pairs",
    "load_model",
    "load_pairs",
    "load_refusal_pairs",
    "load_technical_depth_pairs",
    "load_tool_restraint_pairs",
    "load_uncertainty_pairs",
    "merge_stores",
    "monitor",
    "prepare_inputs",
    "project",
    "project_text",
    "resolve_hooks",
    "run_extraction",
    "verify",
    "write_report",
]

if TYPE_CHECKING:
    from tl_persona.caa import extract_caa_vector, extract_caa_vectors
    from tl_persona.configs import get_model_config
    from tl_persona.contrast import (
        BEHAVIORS,
        ContrastPair,
        ContrastPairDataset,
        load_assertiveness_pairs,
        load_conciseness_pairs,
        load_creativity_pairs,
        load_empathy_pairs,
        load_formality_pairs,
        load_humor_pairs,
        load_instruction_hierarchy_pairs,
        load_pairs,
        load_refusal_pairs,
        load_technical_depth_pairs,
        load_tool_restraint_pairs,
        load_uncertainty_pairs,
    )
    from tl_persona.errors import TLPersonaError
    from tl_persona.extraction import ExtractionResult, extract_activations, run_extraction
    from tl_persona.generation import Generation, generate
    from tl_persona.hooks import resolve_hooks
    from tl_persona.loading import load_model
    from tl_persona.masks import MaskStrategy
    from tl_persona.merging import merge_stores
    from tl_persona.prepared import PreparedInput, prepare_inputs
    from tl_persona.projection import project_text
    from tl_persona.report import write_report
    from tl_persona.samples import BASELINE_PERSONA_ID, Persona, PersonaDataset, QAPair
    from tl_persona.steering import Intervention, attach, monitor, project
    from tl_persona.store import PersonaVectorStore
    from tl_persona.vectors import SteeringVector, SteeringVectorSet
    from tl_persona.verification import verify


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
