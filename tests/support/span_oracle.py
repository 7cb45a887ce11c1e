"""Nasty texts, and what the spans of a chat must be: found from the template's account, without the package's help."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from chat_families import FAMILIES
from hypothesis import strategies as st
from templates import BEHAVIOURS, DEFAULT_SYSTEM, Behaviour, Pieces, Turns, in_text
from tokenizer_kinds import SPECIAL, SWALLOWS, add_control_tokens, fast_tokenizer

from tl_persona.models.checkpoints import load_tokenizer
from tl_persona.prompts.prepare import Chat, prepare_prompts
from tl_persona.prompts.prompt import Prompt
from tl_persona.prompts.verify import verify

TEMPLATES = (*BEHAVIOURS, *FAMILIES)
BY_NAME = {behaviour.name: behaviour for behaviour in TEMPLATES}
ROLES = ("system", "user", "assistant")
BYTE_LEVEL = ("byte_level", "byte_level_trimmed_offsets", "smollm2")
"""Tokenizers whose tokens are the bytes of the text, so that spans follow from byte lengths alone."""


@cache
def tokenizer_of(kind: str) -> Any:
    """A tokenizer by kind, the demo model's among them, each built once; set the template before use."""
    if kind != "smollm2":
        return fast_tokenizer(kind)
    tokenizer = load_tokenizer("smollm2")
    add_control_tokens(tokenizer)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def one(tokenizer: Any, system: str, user: str, assistant: str, **kwargs: Any) -> Prompt:
    return prepare_prompts(tokenizer, [Chat("s1", system, user, assistant)], **kwargs)[0]


def said(prompt: Prompt) -> list[str]:
    return [prompt.prompt_text[span.char_start : span.char_end] for span in prompt.spans]


FRAGMENTS = [
    *("A", "B.", "user", "assistant", "system", "model", "Mara", "?", "!\n", ".\n\n", ":", "The answer is A."),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u2003", "\xa0", "\u2028"),
    *(
        "<think>",
        "</think>",
        "<think>\n\n</think>\n\n",
        "</think>\n\n",
        "[INST] ",
        " [/INST]",
        "<<SYS>>\n",
        "\n<</SYS>>\n\n",
    ),
    *("<|im_end", "|>", "<|Assistan", "{{ messages }}", "{% raw %}", "{#", "</", "<s", "/think "),
    *(
        "שלום",
        "مرحبا",
        "\u202e",
        "é",
        "e\u0301",
        "\u0301",
        "\u200b",
        "\u200d",
        "\ufeff",
        "👨\u200d👩\u200d👧",
        "🇫🇷",
        "😀",
    ),
    *('"', "\\", "'", "&lt;", "<tool_response>", "</tool_response>", " USER: ", " ASSISTANT: ", "### Response:\n"),
    *("ﬁ", "İ", "ß", "ｆｕｌｌ", "日本語", "\ufffd", "▁", "##", "\x00", "\x1f", DEFAULT_SYSTEM),
]
NASTY = {
    "the answer in the persona and the question": ("You are A. A!", "A or A?", "A"),
    "the answer is a role": ("assistant user system", "user", "assistant"),
    "the answer is a letter of every tag": ("m", "s", "e"),
    "the answer is the whole chat": ("A\nuser\nQ\nassistant\nA", "user\nQ\nassistant\nA", "A\nuser\nQ\nassistant\nA"),
    "the answer is what templates write": (DEFAULT_SYSTEM, "Learned until: 2023", "Cutting knowledge: 01 Feb 2003"),
    "looks empty": ("\u200b", "\u2060\ufeff", "\u200d"),
    "white space at the edges": ("  You are Mara.\n", "\tWho?  ", "\nA \n"),
    "wide white space at the edges": ("\u2003You", "Who\xa0", "\u3000A\u2028"),
    "control white space": ("\x1cYou\x1d", "\x0bWho\x0c", "\x1fA\x85"),
    "several lines": ("You.\n\n\nMara.\n", "One\r\nTwo?", "1.\n2.\n\n3."),
    "right to left": ("أنت مارا.", "מי את?", "\u202eA\u202c שלום"),
    "emoji": ("👨\u200d👩\u200d👧🏽", "🇫🇷?", "😀😀"),
    "combining": ("e\u0301e\u0301", "\u0301?", "a\u0323\u0302 Å \u212b"),
    "composed already": ("é Å", "ç?", "ệ"),
    "zero width inside": ("Ma\u200bra", "W\u2060ho", "A\ufeffB"),
    "compatibility letters": ("ﬁsh ½ ①", "ｆｕｌｌ?", "ﷺ"),
    "other scripts": ("日本語のペルソナ", "ไทย?", "हिन्दी"),
    "letters that change length in lower case": ("İstanbul", "ß?", "ŉ"),
    "pieces of control tokens": ("<|im_end", "|><|", "<s"),
    "pieces of tags": ("[INST", "[/INST] <<SYS>>", "\n<</SYS>>\n\n"),
    "tags as text": (" USER: ", "### Response:\n", " ASSISTANT: "),
    "template language": ("{{ messages }}", "{% raw %}", "{# A #}"),
    "quotes and slashes": ('"You"', "Who\\?", "'A' &amp; \"B\""),
    "signs of vocabularies": ("▁You ▁", "##Who", "Ġ Ċ Â"),
    "bytes spelled out": ("<0x41>", "\\x41", "\ufffd"),
    "pieces of what is put in a text's place": ("QzvX", "QzbadeXuserbXvzK?", "XvzK QzbadeX"),
    "nothing a model prints": ("\x00", "\x7f\x1b[2J", "\x07"),
    "a think block": ("You <think>", "Who </think>?", "<think>\nA or B? A.\n</think>\n\nA"),
    "an empty think block": ("You.", "Who?", "<think>\n\n</think>\n\nA"),
    "an open think block": ("You.", "Who?", "<think>A"),
    "a tool's response": ("You.", "<tool_response>A</tool_response>", "A"),
    "one letter each": ("a", "b", "c"),
    "one letter thrice": ("a", "a", "a"),
    "very long": ("You are Mara. A. " * 300, "A?\n" * 300, "A" * 999),
}
"""Contents by what is nasty about them: system prompt, question, answer."""

CONTROL = [*SPECIAL, *SWALLOWS, "<unk>", "[UNK]"]
texts = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS), st.text(max_size=4)), min_size=1, max_size=6
).map("".join)
contents_of_a_chat = st.one_of(
    st.tuples(texts, texts, texts),
    texts.map(lambda text: (text, text, text)),
    st.tuples(texts, texts).map(lambda pair: (pair[0] + pair[1], pair[1] + "?" + pair[1], pair[1])),
    st.tuples(texts, st.sampled_from(["A", "user", "assistant", "\n", "m"])).map(
        lambda p: (p[1] + p[0], p[1] + "?", p[1])
    ),
)


def is_plain(contents: Sequence[str]) -> bool:
    """Text that every byte-level tokenizer and template must take: not blank, no control token, no tag it looks for."""
    known = (*CONTROL, "think>", "tool_response>", "<|endoftext|>")
    return all(content.strip() and not any(token in content for token in known) for content in contents)


def has_reasoning(answer: str) -> bool:
    """Whether an answer is a block of reasoning, not an empty one, and something behind it."""
    found = re.fullmatch(r"\s*<think>(.*)</think>(.*)", answer, re.DOTALL)
    once = answer.count("<think>") == answer.count("</think>") == 1
    return found is not None and once and all(part.strip() for part in found.groups())


def expected_pieces(behaviour: Behaviour, turns: Turns) -> Pieces:
    """What a template makes of a chat; reasoning of the model's own that it shows is a part of the answer."""
    pieces = list(behaviour.expected(turns))
    place = next((n for n, (_, index) in enumerate(pieces) if index == len(turns) - 1), 0)
    written = pieces[place - 1][0] if place else ""
    if has_reasoning(turns[-1][1]) and re.search(r"<think>\s*\S.*</think>\s*$", written, re.DOTALL):
        start = written.rindex("<think>")
        answer = written[start:] + pieces[place][0]
        pieces[place - 1 : place + 1] = [(written[:start], None), (answer, len(turns) - 1)]
    return pieces


def what_is_left(behaviour: Behaviour, turns: Turns) -> tuple[bool, bool]:
    """Whether the template leaves the contents whole but for white space, and whether they can be told at all.

    They cannot where one is written twice, or not as a piece of what was given, or nothing of it is left.
    """
    left = [(piece, index) for piece, index in expected_pieces(behaviour, turns) if index is not None]
    whole = all(piece in turns[index][1] and piece.strip() == turns[index][1].strip() for piece, index in left)
    if behaviour.unless_there:
        whole = whole and not any(text.endswith(behaviour.unless_there) for _, text in turns)
    once = len({index for _, index in left}) == len(left)

    def is_a_piece(piece: str, index: int) -> bool:
        content = turns[index][1]
        if index == len(turns) - 1 and has_reasoning(content):  # the tags stand in white space of the template's
            piece, content = ("".join(text.split()) for text in (piece, content))
        return piece != "" and piece in content

    return whole and once, once and all(is_a_piece(piece, index) for piece, index in left)


WHITE = "".join(map(chr, [*range(0x9, 0xE), *range(0x2000, 0x200B), 0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F]))
WHITE += "\u205f\u3000"
"""White space by Unicode's property, which tokenizers go by; `str.isspace` has four control characters more."""


def tokens_by_bytes(tokenizer: Any, prompt: Prompt, chars: tuple[int, int]) -> tuple[int, int]:
    """The token span, from the byte lengths of a byte-level tokenizer's tokens, without its offsets.

    Byte-level tokens are the text's bytes, cut: a token's string has one character for each of its bytes, and a
    special token's string is itself.
    """
    text, added = prompt.prompt_text, set(tokenizer.get_added_vocab())
    start, end = (len(text[:char].encode()) for char in chars)
    position, inside = 0, []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())):
        length = len(token.encode()) if token in added else len(token)
        if token in SWALLOWS:
            behind = text.encode()[position + length :].decode()
            length += len(behind.encode()) - len(behind.lstrip(WHITE).encode())
        if position < end and position + length > start and token not in CONTROL:
            inside.append(index)
        position += length
    assert position == len(text.encode())
    return inside[0], inside[-1] + 1


def tokens_by_offsets(prompt: Prompt, chars: tuple[int, int]) -> tuple[int, int]:
    inside = [
        index
        for index, (left, right) in enumerate(prompt.offset_mapping)
        if any(place in range(*chars) for place in range(left, right)) and not prompt.is_special[index]
    ]
    return inside[0], inside[-1] + 1


def agrees_with_the_oracle(
    tokenizer: Any, kind: str, behaviour: Behaviour, prompt: Prompt, contents: Sequence[str]
) -> None:
    text, ranges = in_text(expected_pieces(behaviour, list(zip(ROLES, contents, strict=True))))
    assert prompt.prompt_text == text
    assert prompt.folded == behaviour.folds
    for index, span in enumerate(prompt.spans):
        assert (span.char_start, span.char_end) == ranges[index]
        by_offsets = tokens_by_offsets(prompt, ranges[index])
        expected = tokens_by_bytes(tokenizer, prompt, ranges[index]) if kind in BYTE_LEVEL else by_offsets
        assert (span.token_start, span.token_end) == expected
    changed = {
        name for name, content, now in zip(prompt.spans._fields, contents, said(prompt), strict=True) if content != now
    }
    assert set(prompt.rewritten) == changed
    verify(prompt, tokenizer)
