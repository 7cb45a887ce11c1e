"""The samples that the persona benchmarks run: one bundled persona with a long prompt, any number of questions."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from torch import Tensor

from tl_persona import MaskStrategy, PersonaDataset, QAPair
from tl_persona.masks import SpanBatch, build_masks
from tl_persona.prepared import persona_prompts
from tl_persona.prompts import Prompt
from tl_persona.records import system_prompt

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

    @property
    def tokens_distinct(self) -> int:
        """Tokens with which all begin, counted once, and all others."""
        return self.tokens - self.shared * (len(self.ids) - 1)


def long_persona_inputs(tokenizer: Any, questions: int, persona_tokens: int | None = None) -> PersonaInputs:
    """Biography and attributes as one system prompt of some 600 tokens, and that many questions.

    Args:
        tokenizer: A tokenizer with a chat template.
        questions: How many; past the persona's own they are other people's, asked in the same words.
        persona_tokens: Tokens to cut the description to, which is repeated where it is shorter.
    """
    dataset = PersonaDataset.bundled()
    persona = dataset.get_persona(PERSONA)
    system = "\n\n".join([system_prompt(persona, "biography"), persona.templated_view])
    if persona_tokens is not None:
        ids = tokenizer(system, add_special_tokens=False)["input_ids"]
        system = tokenizer.decode(list(islice(cycle(ids), persona_tokens))).strip()
    own = list(dataset.get_qa(persona.id))
    everybody = [pair for other in dataset if other.id != persona.id for pair in dataset.get_qa(other.id)]
    chosen: list[QAPair] = list(islice(cycle([*own, *everybody]), questions))
    prompts = persona_prompts(tokenizer, system, chosen)
    masks = build_masks(SpanBatch.of(prompts), MaskStrategy.ANSWER_MEAN)
    ids = [prompt.input_ids for prompt in prompts]
    return PersonaInputs(prompts, ids, [mask[: len(each)] for mask, each in zip(masks, ids, strict=True)])
