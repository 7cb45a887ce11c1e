"""`tl-persona preview`: one chat as a model's tokenizer sees it, with spans and masks. No weights are loaded."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from tl_persona.cli.inputs import read_dataset, read_template_kwargs
from tl_persona.data.behaviors import load_pairs
from tl_persona.data.contrast import ContrastPairDataset
from tl_persona.data.jsonl import read_document
from tl_persona.data.personas import answer_text, question_text, system_prompt
from tl_persona.errors import InputError
from tl_persona.models.checkpoints import load_tokenizer
from tl_persona.prompts.masks import MaskStrategy, as_strategies
from tl_persona.prompts.prepare import prepare_messages
from tl_persona.prompts.preview import print_prompt
from tl_persona.prompts.verify import verify

_SOURCES = {
    "data": ("dataset", "personas", "qa", "persona_id", "variant", "question"),
    "pair": ("behavior", "pairs", "pair", "side"),
    "typed": ("system", "user", "answer"),
    "file": ("chat",),
}
"""The arguments of each way to say which chat is meant."""


class _Chat(msgspec.Struct):
    """A line of a data set of chats, as many programs write it."""

    messages: list[dict[str, str]]


class _Sample(NamedTuple):
    title: str
    sample_id: str
    messages: Sequence[Mapping[str, str]]


def run(arguments: Namespace) -> int:
    """Prints the sample and returns the exit code."""
    every = arguments.mask_strategy == ["all"]
    strategies = tuple(MaskStrategy) if every else as_strategies(arguments.mask_strategy)
    sample = _sample(arguments)
    tokenizer = load_tokenizer(
        arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    kwargs = read_template_kwargs(arguments.template_kwarg)
    samples = [(sample.sample_id, sample.messages)]
    prompt = prepare_messages(tokenizer, samples, template_kwargs=kwargs, reasoning=arguments.reasoning)[0]
    verify(prompt, tokenizer)
    print_prompt(
        prompt,
        strategies,
        title=f"{arguments.model} · {sample.title}",
        console=Console(file=sys.stdout, highlight=False, markup=False, emoji=False),
        elide=not arguments.full,
        refusals=every,
    )
    return 0


def _sample(arguments: Namespace) -> _Sample:
    """The chat that is asked for, with a title."""
    given = {
        source: next((name for name in names if getattr(arguments, name) is not None), None)
        for source, names in _SOURCES.items()
    }
    named = [f"--{name.replace('_', '-')}" for name in given.values() if name is not None]
    if len(named) > 1:
        raise InputError(f"{named[0]} goes without {named[1]}: show one kind of chat at a time")
    if given["pair"]:
        return _of_a_pair(arguments)
    if given["file"]:
        return _Sample(Path(arguments.chat).name, "chat", read_document(arguments.chat, _Chat).messages)
    return _typed(arguments) if given["typed"] else _of_the_data(arguments)


def _typed(arguments: Namespace) -> _Sample:
    if arguments.user is None or arguments.answer is None:
        raise InputError("--user and --answer go together: give both texts, and --system if there is one")
    return _Sample("typed", "typed", _chat(arguments.system, arguments.user, arguments.answer))


def _chat(system: str | None, user: str, answer: str) -> list[dict[str, str]]:
    contents = {"system": system, "user": user, "assistant": answer}
    return [{"role": role, "content": content} for role, content in contents.items() if content is not None]


def _of_a_pair(arguments: Namespace) -> _Sample:
    if arguments.behavior is None and arguments.pairs is None:
        raise InputError("--pair and --side go with --behavior or --pairs: say which pairs")
    pairs = load_pairs(arguments.behavior) if arguments.behavior else ContrastPairDataset.load(arguments.pairs)
    number, side = arguments.pair or 1, arguments.side or "positive"
    if number > len(pairs):
        raise InputError(f"{pairs.behavior} has {len(pairs)} pairs, so there is no --pair {number}")
    messages = getattr(pairs[number - 1], side)
    if isinstance(messages, str):
        raise InputError(f"pair {number} of {pairs.behavior} is plain text, which no chat template touches: see a chat")
    return _Sample(f"{pairs.behavior} · pair {number} · {side}", f"{number}:{side}", messages)


def _of_the_data(arguments: Namespace) -> _Sample:
    dataset = read_dataset(arguments)
    if arguments.persona_id is not None:
        persona = dataset.get_persona(arguments.persona_id)
    else:
        first = next(iter(dataset), None)
        if first is None:
            raise InputError("the data set has no persona: nothing to show")
        persona = first
    variant = arguments.variant or "templated"
    pairs, number = dataset.get_qa(persona.id), arguments.question or 1
    if number > len(pairs):
        raise InputError(f"persona {persona.id!r} has {len(pairs)} questions, so there is no --question {number}")
    pair = pairs[number - 1]
    chat = _chat(system_prompt(persona, variant), question_text(pair), answer_text(pair))
    return _Sample(f"{persona.name} · {variant}", pair.qid, chat)
