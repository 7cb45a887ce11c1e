"""`tl-persona preview`: one chat as a model's tokenizer sees it, with spans and masks. No weights are loaded."""

import sys
from argparse import Namespace

from rich.console import Console

from tl_persona.checkpoints import load_tokenizer
from tl_persona.commands.arguments import read_dataset, read_template_kwargs
from tl_persona.errors import InputError
from tl_persona.masks import MaskStrategy, as_strategies
from tl_persona.preview import print_prompt
from tl_persona.prompts import prepare_messages
from tl_persona.samples import answer_text, question_text, system_prompt
from tl_persona.verification import verify

_TYPED = ("system", "user", "answer")
_OF_THE_DATA = ("dataset", "personas", "qa", "persona_id", "variant", "question")


def run(arguments: Namespace) -> int:
    """Prints the sample and returns the exit code."""
    every = arguments.mask_strategy == ["all"]
    strategies = tuple(MaskStrategy) if every else as_strategies(arguments.mask_strategy)
    title, sample_id, texts = _chat(arguments)
    roles = ("system", "user", "assistant")[-len(texts) :]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    tokenizer = load_tokenizer(
        arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    kwargs = read_template_kwargs(arguments.template_kwarg)
    prompt = prepare_messages(tokenizer, [(sample_id, messages)], template_kwargs=kwargs)[0]
    verify(prompt, tokenizer)
    print_prompt(
        prompt,
        strategies,
        title=title,
        console=Console(file=sys.stdout, highlight=False, markup=False, emoji=False),
        elide=not arguments.full,
        refusals=every,
    )
    return 0


def _chat(arguments: Namespace) -> tuple[str, str, tuple[str, ...]]:
    """Title, sample id and contents of the chat that is asked for."""
    if all(getattr(arguments, name) is None for name in _TYPED):
        return _stored_chat(arguments)
    given = [name for name in _OF_THE_DATA if getattr(arguments, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes without --system, --user and --answer")
    if arguments.user is None or arguments.answer is None:
        raise InputError("--user and --answer go together: give both texts, and --system if there is one")
    texts = (arguments.user, arguments.answer)
    return arguments.model, "typed", texts if arguments.system is None else (arguments.system, *texts)


def _stored_chat(arguments: Namespace) -> tuple[str, str, tuple[str, ...]]:
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
    texts = (system_prompt(persona, variant), question_text(pair), answer_text(pair))
    return f"{arguments.model} · {persona.name} · {variant}", pair.qid, texts
