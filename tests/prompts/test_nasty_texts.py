"""Every nasty text in every template with every kind of tokenizer: spans are right, or the sample is refused."""

import unicodedata

import pytest
from span_oracle import NASTY, ROLES, TEMPLATES, agrees_with_the_oracle, is_plain, one, said, tokenizer_of, what_is_left
from templates import Behaviour
from tokenizer_kinds import TOKENIZERS

from tl_persona.errors import PromptError
from tl_persona.prompts.prompt import Prompt

LOSSY = ("word_piece", "unigram")
"""Kinds that lower-case, normalize or lack letters; their spans are compared by offsets alone."""

KINDS = (*TOKENIZERS, "smollm2")


def _decodes_to_what_it_claims(kind: str, prompt: Prompt) -> bool:
    """Whether each span's tokens, put together by the tokenizer, have the claimed text among them."""
    for span, claimed in zip(prompt.spans, said(prompt), strict=True):
        decoded = tokenizer_of(kind).decode(prompt.input_ids[span.token_start : span.token_end].tolist())
        if kind == "byte_level_composed":
            claimed = unicodedata.normalize("NFC", claimed)
        if kind == "byte_level_prefixed":  # a space more in front of every stretch between added tokens
            claimed, decoded = "".join(claimed.split()), "".join(decoded.split())
        if claimed.strip() not in decoded:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", TEMPLATES, ids=lambda behaviour: behaviour.name)
def test_nasty_texts_are_located_right_or_refused(behaviour: Behaviour, kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = behaviour.template
    place = TEMPLATES.index(behaviour) + KINDS.index(kind)
    # Every template meets every text, and so does every kind; a third of all combinations are enough for both.
    texts = [text for index, text in enumerate(NASTY.items()) if kind == "byte_level" or (index + place) % 3 == 0]
    located = 0
    for what, contents in texts:
        whole, telling = what_is_left(behaviour, list(zip(ROLES, contents, strict=True)))
        try:
            prompt = one(tokenizer, *contents, template_kwargs=dict(behaviour.kwargs))
        except PromptError as error:
            assert "'s1'" in str(error), what
            assert kind != "byte_level" or not is_plain(contents) or not whole, (
                f"{what}: refused for no reason: {error}"
            )
            continue
        assert telling, what
        agrees_with_the_oracle(tokenizer, kind, behaviour, prompt, contents)
        assert kind in LOSSY or _decodes_to_what_it_claims(kind, prompt), what
        located += 1
    assert located >= len(texts) / 4, "refuses too much to show anything"
