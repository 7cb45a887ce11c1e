"""`tl-persona extract`: persona vectors of a data set, saved as they are done."""

import os
from argparse import Namespace
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_persona.cli.inputs import load_for_backend, read_dataset, read_template_kwargs, status_printer
from tl_persona.data.dataset import PersonaDataset
from tl_persona.data.personas import Persona, QAPair, system_prompt
from tl_persona.data.shards import AUTO, looks_like_a_batch_script, parse_shard
from tl_persona.errors import InputError, TLPersonaError
from tl_persona.extraction import ExtractionResult, run_extraction
from tl_persona.models.checkpoints import find_checkpoint
from tl_persona.prompts.masks import MaskStrategy, as_strategies
from tl_persona.store.store import PersonaVectorStore


def run(arguments: Namespace) -> int:
    """Extracts, prints a summary, and returns the exit code."""
    errors = Console(stderr=True, highlight=False)
    wanted = arguments.mask_strategy
    strategies = tuple(MaskStrategy) if wanted == ["all"] else as_strategies(wanted)
    template_kwargs = read_template_kwargs(arguments.template_kwarg)
    dataset = read_dataset(arguments)
    personas = _personas(dataset, arguments, errors)
    if not personas:  # more shards than personas: no failure, and no reason to load a model
        return 0
    # All questions and views are read before the model is loaded: a bad line costs seconds, not minutes. None are kept,
    # for a large file takes more memory than its size; a persona's are read again when its turn comes.
    for persona in personas:
        _questions(dataset, persona, arguments)
        for variant in () if arguments.skip_failed else arguments.variants:
            system_prompt(persona, variant)
    name = find_checkpoint(arguments.model, arguments.revision).name
    model = load_for_backend(arguments, errors)
    results: list[tuple[Persona, ExtractionResult]] = []
    failed: list[str] = []
    with PersonaVectorStore(name, arguments.activations_dir, variants=arguments.variants) as store:
        for persona in personas:
            # Outside the try: only a file that was changed since fails here, and that concerns every persona left.
            questions = _questions(dataset, persona, arguments)
            try:
                done = run_extraction(
                    model,
                    name,
                    questions,
                    arguments.variants,
                    persona=persona,
                    mask_strategy=strategies,
                    verbose=arguments.verbose,
                    activations_dir=arguments.activations_dir,
                    layers=arguments.layers,
                    template_kwargs=template_kwargs,
                    force=arguments.force,
                    batch_tokens=arguments.batch_tokens,
                    store=store,
                    reasoning=arguments.reasoning,
                    on_status=status_printer(errors, verbose=arguments.verbose),
                )
            except TLPersonaError as error:
                if not arguments.skip_failed:
                    raise
                failed.append(persona.id)
                # As `Text`, here and below: brackets in names and messages are no markup, colons no emoji.
                errors.print(Text(f"{persona.id} failed: ", "red").append(str(error), "default"))
                continue
            for result in done:
                for reason in result.reasons:
                    again = f"{persona.id} {result.variant} {result.strategy}: extracted again: {reason}"
                    errors.print(Text(again))
            results += [(persona, result) for result in done]
    Console(highlight=False, markup=False, emoji=False).print(_summary(results))
    if failed:
        errors.print(Text(f"{len(failed)} of {len(personas)} personas failed: {', '.join(failed)}"))
    return 1 if failed else 0


def _personas(dataset: PersonaDataset, arguments: Namespace, console: Console) -> Sequence[Persona]:
    if arguments.persona_id:
        chosen = [dataset.get_persona(persona_id) for persona_id in dict.fromkeys(arguments.persona_id)]
    else:
        chosen = list(dataset)[: arguments.sample_size]
    if not chosen:
        raise InputError("the data set has no persona: nothing to extract")
    if arguments.shard is None:
        return chosen
    shard = parse_shard(arguments.shard, os.environ)
    part = shard.of(chosen)
    console.print(f"shard {shard} ({shard.source}): {len(part)} of {len(chosen)} personas")
    if arguments.shard == AUTO and looks_like_a_batch_script(os.environ):
        console.print(
            "[yellow]not started by srun, so this may be the only shard that runs:[/yellow] put srun before it"
        )
    return part


def _questions(dataset: PersonaDataset, persona: Persona, arguments: Namespace) -> list[QAPair]:
    if arguments.n_train is None:
        chosen = list(dataset.get_qa(persona.id))
    else:
        chosen = list(dataset.train_test_split(persona.id, n_train=arguments.n_train, seed=arguments.seed)[0])
    # The type filter comes after the split, so that the split does not depend on it.
    if arguments.qa_type != "all":
        chosen = [pair for pair in chosen if pair.type == arguments.qa_type]
    if not chosen and not arguments.skip_failed:
        raise InputError(
            f"persona {persona.id!r}: no question is left with --qa-type {arguments.qa_type}"
            f"{'' if arguments.n_train is None else f' --n-train {arguments.n_train}'}: widen the selection"
        )
    return chosen


def _summary(results: Sequence[tuple[Persona, ExtractionResult]]) -> Table:
    """One row a persona and variant; strategies that share the row share its forward passes too."""
    rows: dict[tuple[str, str], list[ExtractionResult]] = {}
    for persona, result in results:
        rows.setdefault((persona.id, result.variant), []).append(result)
    table = Table("persona", "variant", title="persona vectors")
    table.add_column("questions", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("extracted", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("saved in", overflow="fold")
    for (persona_id, variant), group in rows.items():
        table.add_row(
            persona_id,
            variant,
            str(max(result.n_questions for result in group)),
            f"{max(result.n_tokens for result in group):,}",
            str(sum(result.extracted for result in group)),
            str(sum(not result.extracted for result in group)),
            "/".join((group[0].strategy if len(group) == 1 else "<strategy>", variant)),
        )
    if results:
        # The model's folder is the same for all rows, so it stands below the table once.
        table.caption = f"under {results[0][1].output_dir.parent.parent}"
    return table
