"""`tl-persona steer`: what a model says without and with a steering vector, side by side."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tl_persona.commands.model import load_named_model
from tl_persona.errors import InputError, PromptError
from tl_persona.steering import Intervention
from tl_persona.templates import require_chat_tokenizer
from tl_persona.vectors import SteeringVector, SteeringVectorSet


def run(arguments: Namespace) -> int:
    """Generates greedily, prints both texts for every prompt, and returns the exit code."""
    vector = _chosen(Path(arguments.vector), arguments.layer)
    coefficient = 1.0 if arguments.coefficient is None else arguments.coefficient
    # Refuses what has no meaning before the model is loaded.
    Intervention(vector.hook_name, vector.vector, coefficient, arguments.mode)
    model = load_named_model(arguments, Console(stderr=True, highlight=False))
    prompts = [_rendered(model.tokenizer, prompt) for prompt in arguments.prompt]
    plain = [_answer(model, ids, arguments.max_new_tokens) for ids in prompts]
    with vector.steer(model, coefficient, mode=arguments.mode):
        steered = [_answer(model, ids, arguments.max_new_tokens) for ids in prompts]
    console = Console(highlight=False, markup=False, emoji=False)
    how = arguments.mode if arguments.mode == "ablate" else f"{arguments.mode} {coefficient:+g}"
    for prompt, *texts in zip(arguments.prompt, plain, steered, strict=True):
        table = Table(title=f"> {prompt}", title_justify="left", title_style="bold", show_lines=True)
        table.add_column("unsteered", ratio=1, overflow="fold")
        table.add_column(f"{vector.behavior}, layer {vector.layer_index}, {how}", ratio=1, overflow="fold")
        table.add_row(*texts)
        console.print(table)
    return 0


def _chosen(path: Path, layer: int | None) -> SteeringVector:
    if path.is_dir():
        vectors = SteeringVectorSet.load(path)
        if layer is None:
            return vectors.get_best()
        if layer not in vectors.layers:
            raise InputError(f"--layer {layer}: {path} has layers {', '.join(map(str, vectors.layers))}")
        return vectors[layer]
    vector = SteeringVector.load(path)
    if layer not in (None, vector.layer_index):
        raise InputError(f"--layer {layer}: {path} is a vector of layer {vector.layer_index}")
    return vector


def _rendered(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Ids of the prompt as the user's turn, up to where the answer begins; the template has the special tokens."""
    checked: Any = require_chat_tokenizer(tokenizer)
    turn = [{"role": "user", "content": prompt}]
    try:
        text = checked.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise what it likes
        raise PromptError(f"the chat template cannot render the prompt {prompt!r}: {error}") from error
    return torch.tensor([checked(text, add_special_tokens=False)["input_ids"]])


def _answer(model: Any, ids: torch.Tensor, max_new_tokens: int) -> str:
    device = next(model.parameters()).device
    with torch.no_grad():
        tokens = model.generate(ids.to(device), max_new_tokens=max_new_tokens, do_sample=False, verbose=False)
    text: str = model.tokenizer.decode(tokens[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return text.strip()
