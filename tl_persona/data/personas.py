"""Personas and their questions: plain frozen records, and their words in a chat.

Any object with the attributes of `PersonaLike` or `QALike` can stand for a record.
"""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec

from tl_persona.errors import InputError

BASELINE_PERSONA_ID = "baseline_assistant"
"""The id of the plain assistant, whose view is a system prompt as it stands."""

QAType = Literal["explicit", "implicit"]
ItemType = Literal["mcq", "frq"]
Scope = Literal["individual", "shared"]

RecordId = Annotated[str, msgspec.Meta(min_length=1)]
"""An id that is read from a file: never empty."""


@runtime_checkable
class PersonaLike(Protocol):
    """What is read of a persona, besides the `<variant>_view` of the variant in use."""

    @property
    def id(self) -> str:
        """Unique in its data set."""

    @property
    def name(self) -> str:
        """What to call the person."""


@runtime_checkable
class QALike(Protocol):
    """What is read of a question; records of any class with these attributes are accepted."""

    @property
    def qid(self) -> str:
        """Unique among the questions of its persona."""

    @property
    def type(self) -> str:
        """`explicit` or `implicit`."""

    @property
    def item_type(self) -> str:
        """`mcq` or `frq`."""

    @property
    def question(self) -> str:
        """The question, without its choices."""

    @property
    def answer(self) -> str:
        """The answer in words."""

    @property
    def choices(self) -> Sequence[str]:
        """What a multiple-choice question offers."""

    @property
    def correct_choice_index(self) -> int | None:
        """Position in `choices`, from 0."""


class Persona(msgspec.Struct, frozen=True):
    """A described person.

    Attributes:
        id: Unique in its data set.
        persona: `first_name`, `last_name` and any attributes.
        templated_view: The description as one attribute a line.
        biography_view: The description as a told life; may be empty.

    Example:
        >>> Persona("p1", {"first_name": "Ada", "last_name": "Rao"}, "Name: Ada Rao").name
        'Ada Rao'
    """

    id: RecordId
    persona: dict[str, Any]
    templated_view: str
    biography_view: str = ""

    @property
    def name(self) -> str:
        """First and last name; the id where there is neither."""
        parts = (self.persona.get("first_name"), self.persona.get("last_name"))
        return " ".join(str(part) for part in parts if part).strip() or self.id


class QAPair(msgspec.Struct, frozen=True):
    """A question put to a persona, and the answer that persona gives.

    Attributes:
        qid: Unique among the questions of its persona.
        type: `explicit` when the description states the answer, `implicit` when it follows from it.
        item_type: `mcq` (multiple choice) or `frq` (free response).
        scope: `shared` when every persona gets the same item, else `individual`.
        question: The question, without its choices.
        answer: The answer in words.
        choices: What a multiple-choice question offers.
        correct_choice_index: Position in `choices`, from 0.
        bank_id: The item bank's slot this was made from; two questions of one slot ask for the same fact.
        related_frq_qids: The free-response questions that a shared multiple-choice question was made from.
        id: The id of its persona.

    Example:
        >>> pair = QAPair("q1", "implicit", "mcq", "shared", "Tea or coffee?", "Tea", ("Coffee", "Tea"), 1, id="p1")
        >>> pair.choices[pair.correct_choice_index] == pair.answer
        True
    """

    qid: str
    type: QAType
    item_type: ItemType
    scope: Scope
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    correct_choice_index: int | None = None
    bank_id: str | None = None
    related_frq_qids: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        """Turn lists into tuples, so that a pair given lists is hashable and equal to one that was read."""
        msgspec.structs.force_setattr(self, "choices", tuple(self.choices))
        msgspec.structs.force_setattr(self, "related_frq_qids", tuple(self.related_frq_qids))


def question_text(qa: QALike) -> str:
    """What the user says: the question; for a multiple-choice question also its lettered choices.

    Raises:
        InputError: The question is empty, or the choices cannot be lettered.

    Example:
        >>> print(question_text(QAPair("q1", "explicit", "mcq", "shared", "Tea?", "Yes", ("Yes", "No"), 0)))
        Tea?
        <BLANKLINE>
        A. Yes
        B. No
        <BLANKLINE>
        Reply with the letter of your choice and nothing more.
    """
    if not qa.question.strip():
        raise InputError(f"sample {qa.qid!r}: the question is empty; give it a text or leave the sample out")
    if _correct_letter(qa) is None:
        return qa.question
    lettered = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, qa.choices, strict=False)]
    return "\n".join([qa.question, "", *lettered, "", "Reply with the letter of your choice and nothing more."])


def answer_text(qa: QALike) -> str:
    """What the persona answers: the letter of the correct choice where there is one, else the answer in words.

    Raises:
        InputError: The answer is empty, or the choices cannot be lettered.

    Example:
        >>> answer_text(QAPair("q1", "explicit", "mcq", "shared", "Tea?", "Yes", ("No", "Yes"), 1))
        'B'
    """
    letter = _correct_letter(qa)
    if letter is not None:
        return letter
    if not qa.answer.strip():
        raise InputError(f"sample {qa.qid!r}: the answer is empty; give it a text or leave the sample out")
    return qa.answer


def _correct_letter(qa: QALike) -> str | None:
    if qa.item_type != "mcq" or qa.correct_choice_index is None:
        return None
    index, count = qa.correct_choice_index, len(qa.choices)
    if count > len(ascii_uppercase):
        raise InputError(f"sample {qa.qid!r}: {count} choices; at most {len(ascii_uppercase)} have a letter")
    if not 0 <= index < count:
        raise InputError(f"sample {qa.qid!r}: correct_choice_index {index} is none of its {count} choices")
    return ascii_uppercase[index]


def check_variants(variants: Sequence[str]) -> None:
    """Refuses what is no sequence of views.

    Raises:
        InputError: It is one text, or empty.
    """
    if isinstance(variants, str):
        raise InputError(f"variants is the text {variants!r}: pass a sequence such as ({variants!r},)")
    if not variants:
        raise InputError("no prompt variant was given: pass at least one")


def system_prompt(persona: PersonaLike, variant: str) -> str:
    """The system message that makes a model speak as `persona`, from its attribute `<variant>_view`.

    The baseline's view is returned as it is.

    Raises:
        InputError: The persona has no such view, or it is empty.

    Example:
        >>> ada = Persona("p1", {"first_name": "Ada"}, "Name: Ada")
        >>> system_prompt(ada, "templated").endswith("Name: Ada")
        True
    """
    view = getattr(persona, f"{variant}_view", None)
    if not isinstance(view, str):
        variants = ", ".join(name.removesuffix("_view") for name in dir(persona) if name.endswith("_view"))
        raise InputError(f"persona {persona.id!r} has no variant {variant!r}; it has: {variants or 'none'}")
    if not view.strip():
        raise InputError(f"persona {persona.id!r}: its {variant} view is empty; fill it in or choose another variant")
    return view if persona.id == BASELINE_PERSONA_ID else _IN_CHARACTER + view


_IN_CHARACTER = (
    "From here on you are the person described below. Speak as this person would, in the first person, "
    "keep to the facts given, and do not step out of the part.\n\n"
)
