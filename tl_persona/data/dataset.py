"""The data sets that personas and their questions come from, and the split into training and test questions.

A data set is two JSON Lines files, from a local folder or from the Hugging Face hub, whose client is loaded when a file
is fetched from there. Personas are decoded when the data set is opened; the questions of a persona when they are first
asked for. The item bank among the files says which questions are related.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal, get_args, overload

import msgspec

from tl_persona.data.jsonl import KeyedRecords, StrPath, WithId, bad_line, read_document, read_records
from tl_persona.data.personas import ItemType, Persona, QAPair, QAType, RecordId, Scope
from tl_persona.errors import InputError
from tl_persona.files import present

BANK_FILE = "implicit_shared_mc_bank.json"
"""The item bank: which free-response questions each shared multiple-choice question was made from."""


@overload
def fetch(repo: StrPath, revision: str | None, name: str) -> Path: ...
@overload
def fetch(repo: StrPath, revision: str | None, name: str, *, optional: Literal[True]) -> Path | None: ...
def fetch(repo: StrPath, revision: str | None, name: str, *, optional: bool = False) -> Path | None:
    """The local path of the file `name` of a data set.

    In a local folder only an optional file is looked for; another that is missing is found out when it is read.

    Args:
        repo: A dataset repository's id on the hub, or a local folder.
        revision: Branch, tag or commit of the repository; None for its main branch, and for a folder.
        name: The file's path inside the repository.
        optional: Return None where the data set has no such file.

    Raises:
        InputError: The file cannot be had from the hub, or a revision was asked of a local folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fetch(folder, None, "qa.jsonl").name, fetch(folder, None, BANK_FILE, optional=True)
        ('qa.jsonl', None)
    """
    if os.path.isdir(repo):  # False where the system refuses the name: it may still be a repository's
        if revision is not None:
            raise InputError(f"{repo} is a local folder, which has no revision {revision!r}; leave revision out")
        path = Path(repo, name)
        return None if optional and not present(path) else path
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(repo), name, repo_type="dataset", revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        # Without network an absent file counts as optional only where the hub once said that it does not exist:
        # to go on without the bank could let test questions leak into training.
        if optional and isinstance(error, EntryNotFoundError):
            known = try_to_load_from_cache(str(repo), name, repo_type="dataset", revision=revision)
            if known is _CACHED_NO_EXIST or not isinstance(error, LocalEntryNotFoundError):
                return None
        raise InputError(f"{name} of {repo}: neither a local folder nor available from the hub: {error}") from error


class _BankItem(msgspec.Struct):
    bank_id: str | None = None
    related_frq_qids: tuple[str, ...] | None = None


class _Bank(msgspec.Struct):
    items: tuple[_BankItem, ...] = ()


def related_frq_qids(bank: Path) -> dict[str, tuple[str, ...]]:
    """The `related_frq_qids` that an item bank gives for each of its `bank_id`s; items of one bank id add up.

    Raises:
        InputError: The file cannot be read or is no item bank.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, BANK_FILE)
        ...     _ = path.write_text('{"items": [{"bank_id": "b1", "related_frq_qids": ["f1", "f2"]}]}')
        ...     related_frq_qids(path)
        {'b1': ('f1', 'f2')}
    """
    related: dict[str, list[str]] = {}
    for item in read_document(bank, _Bank).items:
        if item.bank_id:
            related.setdefault(item.bank_id, []).extend(item.related_frq_qids or ())
    return {bank_id: tuple(qids) for bank_id, qids in related.items()}


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
        folder = Path(__file__).with_name("bundled")
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
