"""The data sets that personas and their questions come from, and the split into training and test questions.

A data set is two JSON Lines files. Personas are decoded when it is opened; the questions of a persona when they are
first asked for. What a record is and says is `records`' work, and its names can be imported from here too; fetching
files is `hub`'s; reading lines is `jsonl`'s. No torch here.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import get_args

from tl_persona.errors import InputError
from tl_persona.hub import BANK_FILE, fetch, related_frq_qids
from tl_persona.jsonl import KeyedRecords, StrPath, WithId, bad_line, read_records
from tl_persona.records import (
    BASELINE_PERSONA_ID,
    ItemType,
    Persona,
    PersonaLike,
    QALike,
    QAPair,
    QAType,
    RecordId,
    Scope,
    answer_text,
    question_text,
    system_prompt,
)

__all__ = [
    "BASELINE_PERSONA_ID",
    "ItemType",
    "Persona",
    "PersonaDataset",
    "PersonaLike",
    "QALike",
    "QAPair",
    "QAType",
    "Scope",
    "answer_text",
    "question_text",
    "system_prompt",
]


class _QARow(WithId, kw_only=True):
    # A line of a QA file. Other libraries write null for an absent list.
    qid: RecordId
    type: QAType
    item_type: ItemType
    scope: Scope
    question: str
    answer: str
    choices: tuple[str, ...] | None = None
    correct_choice_index: int | None = None
    bank_id: str | None = None
    related_frq_qids: tuple[str, ...] | None = None


class PersonaDataset:
    """Personas and their questions, from two JSON Lines files.

    Iteration, `len` and indexing go over the personas, in file order.

    Args:
        personas: Path of the persona file; read at once.
        qa: Path of the QA file, or a function that returns it; called and read at the first question asked for.
        persona_ids: Keep these personas only.
        related_frq_qids_by_bank_id: The `related_frq_qids` of rows that have a `bank_id` and none of their own.

    Raises:
        InputError: A file or line is bad, or one of `persona_ids` is not in the file.

    Example:
        >>> data = PersonaDataset.bundled()
        >>> train, test = data.train_test_split(data.persona_ids[0], n_train=3)
        >>> len(train), {pair.item_type for pair in test}
        (3, {'mcq'})
    """

    def __init__(
        self,
        personas: StrPath,
        qa: StrPath | Callable[[], StrPath],
        *,
        persona_ids: Iterable[str] | None = None,
        related_frq_qids_by_bank_id: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._by_id: dict[str, Persona] = {}
        for number, persona in read_records(personas, Persona):
            if persona.id in self._by_id:
                raise bad_line(personas, number, f"a second persona with the id {persona.id!r}; ids are unique")
            self._by_id[persona.id] = persona
        if persona_ids is not None:
            wanted = {self.get_persona(id).id for id in persona_ids}
            self._by_id = {id: persona for id, persona in self._by_id.items() if id in wanted}
        self._qa = qa
        self._related = related_frq_qids_by_bank_id or {}
        self._rows: KeyedRecords[_QARow] | None = None

    @classmethod
    def bundled(cls) -> "PersonaDataset":
        """The personas that come with this package."""
        folder = Path(__file__).with_name("data")
        return cls(folder / "personas.jsonl", folder / "qa.jsonl")

    @classmethod
    def from_jsonl(
        cls, personas: StrPath, qa: StrPath, *, persona_ids: Iterable[str] | None = None
    ) -> "PersonaDataset":
        """Two local files; with `persona_ids`, only those personas."""
        return cls(personas, qa, persona_ids=persona_ids)

    @classmethod
    def from_hub(
        cls,
        repo: StrPath,
        *,
        revision: str | None = None,
        personas_file: str = "dataset_personas.jsonl",
        qa_file: str = "dataset_qa.jsonl",
    ) -> "PersonaDataset":
        """A dataset repository on the Hugging Face hub, or a local folder that holds the same files.

        The QA file is downloaded at the first question asked for. If there is an `implicit_shared_mc_bank.json`, it
        gives `related_frq_qids` to the rows of its `bank_id`s that have none.

        Raises:
            InputError: A file cannot be had or is bad, or a revision was asked of a local folder.
        """
        bank = fetch(repo, revision, BANK_FILE, optional=True)
        return cls(
            fetch(repo, revision, personas_file),
            partial(fetch, repo, revision, qa_file),
            related_frq_qids_by_bank_id=related_frq_qids(bank) if bank else None,
        )

    @property
    def personas(self) -> tuple[Persona, ...]:
        """The personas, in file order."""
        return tuple(self._by_id.values())

    @property
    def persona_ids(self) -> tuple[str, ...]:
        """Their ids, in file order."""
        return tuple(self._by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Persona]:
        return iter(self._by_id.values())

    def __getitem__(self, index: int) -> Persona:
        return self.personas[index]

    def get_persona(self, persona_id: str) -> Persona:
        """The persona of that id.

        Raises:
            InputError: There is none; names those with similar ids.
        """
        if persona_id not in self._by_id:
            raise InputError(f"no persona {persona_id!r}{_suggestion(persona_id, self._by_id)}")
        return self._by_id[persona_id]

    def get_qa(
        self, persona_id: str, type: str | None = None, item_type: str | None = None, scope: str | None = None
    ) -> list[QAPair]:
        """The questions of a persona in file order; of the given type, item type and scope only.

        Raises:
            InputError: An unknown persona or filter value, or a bad line among the persona's rows.
        """
        wanted = {"type": (type, QAType), "item_type": (item_type, ItemType), "scope": (scope, Scope)}
        for field, (value, kind) in wanted.items():
            if value is not None and value not in get_args(kind):
                raise InputError(f"unknown {field} {value!r}{_suggestion(value, get_args(kind))}")
        return [
            pair
            for pair in self._pairs(persona_id)
            if all(value in (None, getattr(pair, field)) for field, (value, _) in wanted.items())
        ]

    def train_test_split(
        self, persona_id: str, n_train: int | None = None, seed: int | None = 0
    ) -> tuple[list[QAPair], list[QAPair]]:
        """Train on free-response questions of one persona, test on the choices every persona is given, without leaks.

        Test: the shared multiple-choice questions, in file order. Train: the individual free-response questions that
        share no bank id with a test question and that no test question was made from, shuffled by
        `random.Random(seed)` (file order when `seed` is None), then cut to `n_train`.

        Raises:
            InputError: As `get_qa`; or `n_train` is below 1.
        """
        if n_train is not None and n_train < 1:
            raise InputError(f"n_train is {n_train}; give at least 1, or None for every question")
        pairs = self.get_qa(persona_id)
        test = [pair for pair in pairs if (pair.item_type, pair.scope) == ("mcq", "shared")]
        tested_bank_ids = {pair.bank_id for pair in test if pair.bank_id is not None}
        tested_qids = {qid for pair in test for qid in pair.related_frq_qids}
        train = [
            pair
            for pair in pairs
            if (pair.item_type, pair.scope) == ("frq", "individual")
            and pair.bank_id not in tested_bank_ids
            and pair.qid not in tested_qids
        ]
        if seed is not None:
            random.Random(seed).shuffle(train)
        return train[:n_train], test

    def _pairs(self, persona_id: str) -> Iterator[QAPair]:
        self.get_persona(persona_id)
        if self._rows is None:
            path = self._qa() if callable(self._qa) else self._qa
            self._rows = KeyedRecords(path, _QARow, self._by_id)
        seen: set[str] = set()
        for number, row in self._rows.of(persona_id):
            if row.qid in seen:
                problem = f"persona {persona_id!r} has a second question with the qid {row.qid!r}; qids are unique"
                raise bad_line(self._rows.path, number, problem)
            seen.add(row.qid)
            yield QAPair(
                qid=row.qid,
                type=row.type,
                item_type=row.item_type,
                scope=row.scope,
                question=row.question,
                answer=row.answer,
                choices=row.choices or (),
                correct_choice_index=row.correct_choice_index,
                bank_id=row.bank_id or None,
                related_frq_qids=tuple(row.related_frq_qids or self._related.get(row.bank_id or "", ())),
                id=row.id,
            )


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; there are {len(known)}: {', '.join(map(repr, known[:5]))}{', ...' if len(known) > 5 else ''}"
