"""`tl-persona steer`: what a model says without and with a steering vector, side by side."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tl_persona.cli.inputs import load_named_model
from tl_persona.errors import InputError
from tl_persona.generation import generate
from tl_persona.steering.interventions import Intervention
from tl_persona.vectors.vector import SteeringVector
from tl_persona.vectors.vector_set import SteeringVectorSet


def run(arguments: Namespace) -> int:
    """Generates greedily, prints both texts for every prompt, and returns the exit code."""
    vector = _chosen(Path(arguments.vector), arguments.layer)
    coefficient = 1.0 if arguments.coefficient is None else arguments.coefficient
    # Refuses what has no meaning before the model is loaded.
    Intervention(vector.hook_name, vector.vector, coefficient, arguments.mode)
    model = load_named_model(arguments, Console(stderr=True, highlight=False))
    chats = [[{"role": "user", "content": prompt}] for prompt in arguments.prompt]
    plain = generate(model, chats, max_new_tokens=arguments.max_new_tokens)
    with vector.steer(model, coefficient, mode=arguments.mode):
        steered = generate(model, chats, max_new_tokens=arguments.max_new_tokens)
    console = Console(highlight=False, markup=False, emoji=False)
    how = arguments.mode if arguments.mode == "ablate" else f"{arguments.mode} {coefficient:+g}"
    for prompt, *answers in zip(arguments.prompt, plain, steered, strict=True):
        table = Table(title=f"> {prompt}", title_justify="left", title_style="bold", show_lines=True)
        table.add_column("unsteered", ratio=1, overflow="fold")
        table.add_column(f"{vector.behavior}, layer {vector.layer_index}, {how}", ratio=1, overflow="fold")
        table.add_row(*(answer.text.strip() for answer in answers))
        console.print(table)
    return 0


def _chosen(path: Path, layer: int | None) -> SteeringVector:
    if path.is_dir():
        vectors = SteeringVectorSet.load(path)
        if layer is None:
            choice = vectors.best_layer()
            if choice.caution:
                Console(stderr=True, highlight=False, markup=False).print(f"warning: {choice.caution}")
            return vectors[choice.layer]
        if layer not in vectors.layers:
            raise InputError(f"--layer {layer}: {path} has layers {', '.join(map(str, vectors.layers))}")
        return vectors[layer]
    vector = SteeringVector.load(path)
    if layer not in (None, vector.layer_index):
        raise InputError(f"--layer {layer}: {path} is a vector of layer {vector.layer_index}")
    return vector
