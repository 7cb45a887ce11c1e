"""The samples that the persona benchmarks run: one bundled persona with a long prompt, any number of questions."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import msgspec
from torch import Tensor

from tl_persona import MaskStrategy, Persona, PersonaDataset, QAPair
from tl_persona.data.personas import system_prompt
from tl_persona.prompts.inputs import persona_prompts
from tl_persona.prompts.masks import SpanBatch, build_masks
from tl_persona.prompts.prompt import Prompt

PERSONA = "mara_okonkwo"


@dataclass(frozen=True)
class PersonaInputs:
    """Prompts with the masks of one strategy."""

    prompts: list[Prompt]
    ids: list[Tensor]
    masks: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    @property
    def shared(self) -> int:
        """Tokens that all begin with."""
        columns = zip(*(ids.tolist() for ids in self.ids), strict=False)
        return next(index for index, column in enumerate(columns) if len(set(column)) > 1)


def long_persona() -> Persona:
    """A bundled persona whose biography has its attributes behind it: some 600 tokens."""
    persona = PersonaDataset.bundled().get_persona(PERSONA)
    return msgspec.structs.replace(
        persona, biography_view="\n\n".join([persona.biography_view, persona.templated_view])
    )


def questions_to_it(count: int) -> list[QAPair]:
    """That many questions: the persona's own, then other people's, asked in the same words."""
    dataset = PersonaDataset.bundled()
    everybody = [pair for other in dataset if other.id != PERSONA for pair in dataset.get_qa(other.id)]
    return list(islice(cycle([*dataset.get_qa(PERSONA), *everybody]), count))


def long_persona_inputs(tokenizer: Any, questions: int, persona_tokens: int | None = None) -> PersonaInputs:
    """The long persona's system prompt and that many questions, masked with `answer_mean`.

    Args:
        tokenizer: A tokenizer with a chat template.
        questions: How many.
        persona_tokens: Tokens to cut the description to, which is repeated where it is shorter.
    """
    system = system_prompt(long_persona(), "biography")
    if persona_tokens is not None:
        ids = tokenizer(system, add_special_tokens=False)["input_ids"]
        system = tokenizer.decode(list(islice(cycle(ids), persona_tokens))).strip()
    prompts = persona_prompts(tokenizer, system, questions_to_it(questions))
    masks = build_masks(SpanBatch.of(prompts), MaskStrategy.ANSWER_MEAN)
    ids = [prompt.input_ids for prompt in prompts]
    return PersonaInputs(prompts, ids, [mask[: len(each)] for mask, each in zip(masks, ids, strict=True)])
