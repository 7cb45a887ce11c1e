"""`tl-persona export`: steering vectors into the files of other programs, and out of them."""

import sys
from argparse import Namespace
from pathlib import Path

from tl_persona.errors import InputError
from tl_persona.files import is_folder
from tl_persona.models.hooks import resolve_hooks
from tl_persona.vectors.vector import SteeringVector
from tl_persona.vectors.vector_set import SteeringVectorSet

SUFFIX = ".gguf"


def run(arguments: Namespace) -> int:
    """Writes the chosen layers in the chosen format, says where, and returns the exit code."""
    source, output = Path(arguments.source), Path(arguments.output)
    wanted = arguments.format or ("gguf" if output.suffix == SUFFIX else None)
    if wanted is None:
        raise InputError(f"--output {output} does not tell the format: name a .gguf file, or pass --format")
    vectors = _loaded(source)
    chosen = _chosen(vectors, arguments.layers)
    if wanted == "gguf":
        written = chosen.export_gguf(output, model_hint=arguments.model_hint)
    elif wanted == "rotalabs":
        written = chosen.export_rotalabs(output)
    else:
        chosen.save(output)
        written = output
    layers = ", ".join(map(str, chosen.layers))
    print(f"{written}: {chosen.behavior}, {wanted}, layer{'s' if len(chosen) > 1 else ''} {layers}")
    return 0


def _loaded(source: Path) -> SteeringVectorSet:
    if source.suffix == SUFFIX:
        return SteeringVectorSet.import_gguf(source)
    if is_folder(source):
        return SteeringVectorSet.load(source)
    vector = SteeringVector.load(source)
    return SteeringVectorSet(vector.behavior, [vector])


def _chosen(vectors: SteeringVectorSet, layers: list[str] | None) -> SteeringVectorSet:
    if layers is None:
        return vectors
    if layers == ["best"]:
        choice = vectors.best_layer()
        if choice.caution:
            print(f"warning: {choice.caution}", file=sys.stderr)
        return SteeringVectorSet(vectors.behavior, [vectors[choice.layer]])
    by_hook = {vector.hook_name: vector for vector in vectors}
    names = resolve_hooks(layers, by_hook, 1 + max(vectors.layers, default=0))
    return SteeringVectorSet(vectors.behavior, [by_hook[name] for name in names])
