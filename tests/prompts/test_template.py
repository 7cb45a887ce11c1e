"""What is read of a template that changes contents is what it did, for all short contents, or the chat is refused.

The templates here are functions on characters that carry where they come from, so that the truth is known.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_persona.errors import PromptError
from tl_persona.prompts.template import FOLD_SEPARATOR, ChatReader, draw_markers

Letter = str | tuple[str, int]
"""A character, and the content that it comes from; without, it is the template's own."""

Change = Callable[[list[Letter]], list[Letter]]


def _has(content: Sequence[Letter], sign: str) -> bool:
    return any(letter[0] == sign for letter in content)


def _as(letter: Letter, sign: str) -> Letter:
    return sign if isinstance(letter, str) else (sign, letter[1])


def _without(content: list[Letter], sign: str) -> list[Letter]:
    return [letter for letter in content if letter[0] != sign]


def _before_first(content: list[Letter]) -> list[Letter]:
    return content[: [letter[0] for letter in (*content, "#")].index("#")]


def _after_last(content: list[Letter]) -> list[Letter]:
    return _before_first(content[::-1])[::-1]


def _stripped(content: list[Letter], sign: str, ends: Iterable[int] = (0, -1)) -> list[Letter]:
    content = list(content)
    for end in ends:
        while content and content[end][0] == sign:
            content.pop(end)
    return content


def _begun(content: list[Letter]) -> list[Letter]:
    return content if content[:1] and content[0][0] == "|" else ["|", *content]


def _ended(content: list[Letter]) -> list[Letter]:
    return content if content[-1:] and content[-1][0] == "|" else [*content, "|"]


CHANGES: dict[str, Change] = {
    "none": lambda content: content,
    "a flag is removed": lambda content: _without(content, "#"),
    "cut to behind the last tag": _after_last,
    "cut to before the first tag": _before_first,
    "two letters are left of tagged text": lambda content: content[:2] if _has(content, "#") else content,
    "tags are stripped": lambda content: _stripped(content, "#"),
    "one tag is taken off": lambda content: content[1:] if content[:1] and content[0][0] == "#" else content,
    "repeats are removed": lambda content: [
        letter for before, letter in zip([" ", *content], content, strict=False) if before[0] + letter[0] != "--"
    ],
    "tags become dashes": lambda content: [_as(letter, "-") if letter[0] == "#" else letter for letter in content],
    "tags become bars": lambda content: [_as(letter, "|") if letter[0] == "#" else letter for letter in content],
    "dashes are doubled": lambda content: [each for letter in content for each in [letter] * (1 + (letter[0] == "-"))],
    "bars are stripped and one is written": lambda content: ["|", *_stripped(content, "|"), "|"],
    "a bar in front unless there": _begun,
    "a bar behind unless there": _ended,
    "cut, then a bar in front unless there": lambda content: _begun(_after_last(content)),
    "cut, then a bar behind unless there": lambda content: _ended(_before_first(content)),
    "a bar in front unless cut": lambda content: _after_last(content) if _has(content, "#") else ["|", *content],
    "a bar behind unless cut": lambda content: _before_first(content) if _has(content, "#") else [*content, "|"],
    "cut, then stripped of bars": lambda content: _stripped(_after_last(content), "|"),
}
"""What templates do to a content, with `#` for a tag and `|` for what templates write too."""

TOGETHER: dict[str, Callable[[list[Letter], list[Letter]], tuple[list[Letter], list[Letter]]]] = {
    "the answer is cut where the question has a flag": lambda question, answer: (
        _without(question, "#"),
        _after_last(answer) if _has(question, "#") else answer,
    ),
    "the question is cut where the answer is": lambda question, answer: (
        _after_last(question) if _has(answer, "#") else question,
        _after_last(answer),
    ),
    "what is cut from the question is in front of the answer": lambda question, answer: (
        _before_first(question),
        [*question[len(_before_first(question)) :], *answer],
    ),
    "the longer one is cut to the other": lambda question, answer: (
        question[: len(answer)] if _has(question, "#") else question,
        answer[: len(question)] if _has(answer, "#") else answer,
    ),
}


class _Template:
    """A tokenizer as far as reading needs one; its template is a function from contents to letters."""

    chat_template: Any = "a function"
    is_fast = True

    def __init__(self, written: Callable[[list[list[Letter]]], list[Letter]], system_role: bool = True) -> None:
        self.written, self.system_role, self.rendered = written, system_role, 0

    def __call__(self, text: Any, **_: Any) -> Any:
        raise AssertionError("no text is tokenized")

    def decode(self, token_ids: Any, **_: Any) -> str:
        raise AssertionError("no token is decoded")

    def get_chat_template(self) -> str:
        return self.chat_template

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **_: Any) -> str:
        if conversation[0]["role"] == "system" and not self.system_role:
            raise ValueError("no system role")
        self.rendered += 1
        return "".join(self.written([list(message["content"]) for message in conversation]))


def _of_both(question: Change, answer: Change) -> Callable[[list[list[Letter]]], list[Letter]]:
    return lambda contents: ["[", *question(contents[0]), "|", *answer(contents[1]), "]"]


def _truth(letters: Sequence[Letter], content: int) -> tuple[int, int]:
    own = [place for place, letter in enumerate(letters) if not isinstance(letter, str) and letter[1] == content]
    assert own == list(range(own[0], own[-1] + 1)), "nothing can be said of a content that is in pieces"
    return own[0], own[-1] + 1


def _marked(text: str, content: int) -> list[Letter]:
    return [(letter, content) for letter in text]


def _all(signs: str, longest: int) -> list[str]:
    return ["".join(letters) for length in range(1, longest + 1) for letters in product(signs, repeat=length)]


def _read_or_refused(template: _Template, texts: Iterable[tuple[str, str]]) -> int:
    """How many chats are read, each as it is in truth."""
    reader, read = ChatReader(template, {}), 0
    for texts_of_chat in texts:
        try:
            ranges = reader.read(("user", "assistant"), texts_of_chat).ranges
        except PromptError:
            continue
        letters = template.written([_marked(text, index) for index, text in enumerate(texts_of_chat)])
        assert ranges == (_truth(letters, 0), _truth(letters, 1)), texts_of_chat
        read += 1
    return read


@pytest.mark.parametrize("change", CHANGES)
def test_all_short_chats_are_read_right_or_refused_whatever_is_done_to_question_and_answer(change: str) -> None:
    names = list(CHANGES)
    for other in (change, names[names.index(change) - 1], "cut to behind the last tag"):
        template = _Template(_of_both(CHANGES[change], CHANGES[other]))
        _read_or_refused(template, product(_all("-|#", 2), ["-", "#-", "-#", "|", "|-", "-|#-"]))
    template = _Template(_of_both(CHANGES["none"], CHANGES[change]))
    assert _read_or_refused(template, product(["-|"], _all("-|#", 4))) > 15


@pytest.mark.parametrize("change", TOGETHER)
def test_all_short_chats_are_read_right_or_refused_where_one_text_decides_on_the_other(change: str) -> None:
    def written(contents: list[list[Letter]]) -> list[Letter]:
        question, answer = TOGETHER[change](*contents)
        return ["[", *question, "|", *answer, "]"]

    assert _read_or_refused(_Template(written), product(_all("-|#", 2), repeat=2)) > 50


@pytest.mark.parametrize("change", CHANGES)
def test_a_persona_in_the_users_turn_is_read_right_or_refused_whatever_is_done_to_that_turn(change: str) -> None:
    """The template sees one text there and may cut it anywhere, and the blank line in it may stand elsewhere too."""

    def written(contents: list[list[Letter]]) -> list[Letter]:
        return ["[", *CHANGES[change](contents[0]), "|", *_after_last(contents[1]), "]"]

    template = _Template(written, system_role=False)
    reader, read = ChatReader(template, {}), 0
    for persona, question, answer in product(_all("-#\n", 2), ["-", "#", "\n", "-\n\n-"], ["-", "\n\n#-"]):
        try:
            ranges = reader.read(("system", "user", "assistant"), (persona, question, answer)).ranges
        except PromptError:
            continue
        turn = [*_marked(persona, 0), *FOLD_SEPARATOR, *_marked(question, 1)]
        letters = written([turn, _marked(answer, 2)])
        assert ranges == tuple(_truth(letters, index) for index in range(3)), (persona, question, answer)
        read += 1
    assert read


def test_a_chat_costs_three_renderings_and_learning_one() -> None:
    template = _Template(_of_both(CHANGES["none"], CHANGES["none"]))
    reader = ChatReader(template, {})
    for number in range(1, 4):
        reader.read(("user", "assistant"), ("-", "-"))
        assert template.rendered == 1 + 3 * number


def test_a_chat_of_very_many_turns_is_read_where_an_answer_is_cut() -> None:
    def written(contents: list[list[Letter]]) -> list[Letter]:
        return [letter for content in contents for letter in ("[", *_after_last(content), "]")]

    rendering = ChatReader(_Template(written), {}).read(("user", "assistant") * 600, ["-"] * 1199 + ["-#-"])
    assert rendering.text == "[-]" * 1200
    assert rendering.ranges == tuple((3 * turn + 1, 3 * turn + 2) for turn in range(1200))


@pytest.mark.timeout(600)  # it takes a second or two; looking at the text for every letter would take minutes
@pytest.mark.parametrize(("own", "read"), [("[", True), ("-", False)])
def test_a_long_text_takes_no_longer_than_its_length(own: str, read: bool) -> None:
    """What is left of it stands in it everywhere, and once or everywhere with what the template writes in front."""
    template = _Template(lambda contents: ["[", *contents[0], own, *_after_last(contents[1]), "]"])
    reader = ChatReader(template, {})
    if read:
        assert reader.read(("user", "assistant"), ("-", "-" * 1_000_000 + "#-")).ranges == ((1, 2), (3, 4))
    else:
        with pytest.raises(PromptError, match="too often to tell which the template kept"):
            reader.read(("user", "assistant"), ("-", "-" * 1_000_000 + "#-"))
    assert template.rendered <= 2 * (1 + 3 + 3), "one more rendering for every letter takes hours"


# --- texts that hold what markers are made of -----------------------------------------------------------------------

ROLES = ("user", "assistant")


def _first_markers(number: int) -> list[str]:
    """The markers that are drawn one after the other, each where the text holds all before it."""
    found: list[str] = []
    for _ in range(number):
        found.append(draw_markers(ROLES, found).contents[1])
    return found


@pytest.mark.parametrize("changed", ["none", "cut to behind the last tag"])
@given(data=st.data())
def test_a_text_of_pieces_of_markers_is_read_as_any_other(changed: str, data: st.DataObject) -> None:
    pieces = st.sampled_from(["Q", "z", "Qz", "ba", "de", "X", "Xvz", "XvzK", "K", "#", *_first_markers(3), *ROLES])
    text = st.lists(pieces, min_size=1, max_size=8).map("".join).filter(lambda text: not text.endswith("#"))
    template = _Template(_of_both(CHANGES["none"], CHANGES[changed]))
    assert _read_or_refused(template, [(data.draw(text), data.draw(text))]) == 1


def test_a_text_that_holds_every_short_marker_is_read() -> None:
    """All of them in one text: the next ones are longer."""
    stem = draw_markers(ROLES, ()).stem
    syllables = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
    everything = " ".join(f"Qz{one}{two}X" for one, two in product(syllables, repeat=2))
    assert stem in everything and len(draw_markers(ROLES, [everything]).stem) > len(stem)
    template = _Template(_of_both(CHANGES["none"], CHANGES["cut to behind the last tag"]))
    assert _read_or_refused(template, [(everything, f"{everything}#-{everything}")]) == 1


def test_a_template_that_writes_markers_itself_is_read() -> None:
    written = " ".join(_first_markers(3))
    template = _Template(lambda contents: [*written, *contents[0], *written, *contents[1]])
    template.chat_template = f"a function that writes {written}"
    assert _read_or_refused(template, [("-", "-"), (written, f"-{written}")]) == 2
