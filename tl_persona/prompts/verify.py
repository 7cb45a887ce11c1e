"""`verify`: checks again what is promised of a prepared prompt.

Everything is computed anew from the prompt's own fields, and nothing is repaired: what is not as promised raises a
`PromptError`.
"""

from typing import Any

import numpy as np
import torch

from tl_persona.errors import PromptError
from tl_persona.prompts.alignment import TokenAligner, check_spans
from tl_persona.prompts.inputs import PreparedInput
from tl_persona.prompts.masks import build_mask
from tl_persona.prompts.prompt import Prompt


def verify(prompt: Prompt, tokenizer: Any = None) -> None:
    """Checks what is promised of a prompt: its span tokens are exactly those that overlap the claimed text.

    Args:
        prompt: What `prepare_inputs`, `prepare_prompts` or `prepare_messages` returned.
        tokenizer: The tokenizer it was made with. With it, the tokens are decoded too, and must give the text.

    Raises:
        PromptError: Ids, offsets and special-token mask differ in length; the text is not what its proof says the
            template wrote and kept; a span is empty, outside the text or out of order; its tokens are not those that
            overlap it, or are control tokens; they decode to other text; a mask is not that of its strategy.
    """
    ids, special = prompt.input_ids.cpu().numpy(), prompt.is_special.cpu().numpy()
    offsets = np.array(prompt.offset_mapping, dtype=np.int64).reshape(-1, 2)
    try:
        if not len(ids) == len(offsets) == len(special):
            raise PromptError(
                f"{len(ids)} token ids, {len(offsets)} offsets and a special-token mask of {len(special)}: they must "
                "have one length"
            )
        aligner = None if tokenizer is None else TokenAligner(tokenizer)
        check_spans(prompt.prompt_text, prompt.spans, ids, offsets, special, aligner)
        _check_text(prompt)
        if isinstance(prompt, PreparedInput) and not torch.equal(
            prompt.token_mask.cpu(), build_mask(prompt, prompt.mask_strategy).cpu()
        ):
            raise PromptError(f"its mask does not select what {prompt.mask_strategy} says")
    except PromptError as error:
        raise PromptError(f"sample {prompt.sample_id!r}: {error}") from error


def _check_text(prompt: Prompt) -> None:
    """Checks the text and the character ranges of its spans against the proof."""
    text, contents = prompt.prompt_text, prompt.proof.contents
    position, pieces = 0, []
    for start, end in sorted(content.char_range for content in contents):
        pieces.append(text[position:start])
        position = end
    if (*pieces, text[position:]) != prompt.proof.written:
        raise PromptError("around its contents stands something else than what the template wrote")
    claimed = {name: span[:2] for name, span in prompt.spans._asdict().items()}
    for content in contents:
        if claimed.get(content.name, content.char_range) != content.char_range:
            raise PromptError(
                f"the {content.name} span {tuple(getattr(prompt.spans, content.name))} is not where the template put "
                f"it: {content.char_range}"
            )
    question = text[slice(*prompt.spans.question[:2])]
    if "question" not in prompt.rewritten and question != prompt.question:
        raise PromptError(f"the question span holds {question!r}, which is not the question")
