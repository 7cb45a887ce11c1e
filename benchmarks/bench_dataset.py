"""How long it takes to have the first persona's questions out of a large QA file.

The file is written here: 150 MB of rows like the bundled ones, or as many MB as `TL_PERSONA_BENCH_QA_MB` says (1000
is the size of the published data set). Compared are `json.loads` of every line and, where it is installed,
persona-data, whose later runs read a pickle it leaves beside the file. All of them must give the same questions.
"""

import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peer import PEERS

from tl_persona.data.dataset import PersonaDataset

sys.path.append(str(PEERS))  # last, so that none of our own packages is shadowed

MEGABYTES = int(os.environ.get("TL_PERSONA_BENCH_QA_MB", "150"))
ROUNDS = 2 if MEGABYTES <= 200 else 1
N_PERSONAS = 200
WORDS = ("tide", "lamp", "boat", "harbour", "never", "often", "walked", "kept", "letter", "winter", "garden", "sister")
FIELDS = ("qid", "type", "item_type", "scope", "question", "answer", "correct_choice_index", "bank_id")

Question = tuple[Any, ...]
Loader = Callable[[Path, Path, str], list[Question]]


def persona_of(number: int) -> dict[str, Any]:
    return {
        "id": f"person-{number:04d}",
        "persona": {"first_name": f"First{number}", "last_name": f"Last{number}"},
        "templated_view": "You are a person of few words.",
        "biography_view": "Born by the sea, you stayed there.",
    }


def row_of(persona_id: str, number: int, choose: random.Random) -> dict[str, Any]:
    multiple_choice = number % 3 == 0
    return {
        "id": persona_id,
        "qid": f"{persona_id}-q{number}",
        "type": "implicit" if number % 2 else "explicit",
        "item_type": "mcq" if multiple_choice else "frq",
        "scope": "shared" if multiple_choice else "individual",
        "question": " ".join(choose.choices(WORDS, k=35)) + "?",
        "answer": " ".join(choose.choices(WORDS, k=70)) + ".",
        "choices": [" ".join(choose.choices(WORDS, k=6)) for _ in range(4)] if multiple_choice else [],
        "correct_choice_index": number % 4 if multiple_choice else None,
        "bank_id": f"bank-{number % 40}",
        "related_frq_qids": [f"{persona_id}-q{number + 1}"] if multiple_choice else [],
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dataset")
    personas, qa = folder / "personas.jsonl", folder / "qa.jsonl"
    choose = random.Random(0)
    personas.write_text("".join(json.dumps(persona_of(number)) + "\n" for number in range(N_PERSONAS)))
    # A few hundred texts, used again under new ids: drawing words for a million rows would take far too long.
    texts = [row_of("", number, choose) for number in range(300)]
    wanted, per_persona, written = MEGABYTES * 10**6, MEGABYTES * 10**6 // N_PERSONAS, 0
    with qa.open("w", encoding="utf-8") as file:
        for persona in range(N_PERSONAS):
            persona_id, number = f"person-{persona:04d}", 0
            while written < min((persona + 1) * per_persona, wanted):
                text = texts[number % len(texts)]
                related = [f"{persona_id}-q{number + 1}"] if text["related_frq_qids"] else []
                row = text | {"id": persona_id, "qid": f"{persona_id}-q{number}", "related_frq_qids": related}
                written += file.write(json.dumps(row) + "\n")
                number += 1
    return personas, qa


def ours(personas: Path, qa: Path, persona_id: str) -> list[Question]:
    pairs = PersonaDataset.from_jsonl(personas, qa).get_qa(persona_id)
    return [
        (*(getattr(pair, name) for name in FIELDS), tuple(pair.choices), tuple(pair.related_frq_qids)) for pair in pairs
    ]


def every_line(personas: Path, qa: Path, persona_id: str) -> list[Question]:
    with open(personas, encoding="utf-8") as file:
        known = {json.loads(line)["id"] for line in file}
    assert persona_id in known
    with open(qa, encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["id"] == persona_id]
    return [(*(row[name] for name in FIELDS), tuple(row["choices"]), tuple(row["related_frq_qids"])) for row in rows]


def persona_data(personas: Path, qa: Path, persona_id: str) -> list[Question]:
    from persona_data.synth_persona import PersonaDataset as Reference

    pairs = Reference(personas, qa).get_qa(persona_id)
    return [
        (*(getattr(pair, name) for name in FIELDS), tuple(pair.choices), tuple(pair.related_frq_qids)) for pair in pairs
    ]


def persona_data_without_its_pickle(personas: Path, qa: Path, persona_id: str) -> list[Question]:
    for left in qa.parent.glob(f"{qa.name}.*.pkl"):
        left.unlink()
    return persona_data(personas, qa, persona_id)


def loaders() -> dict[str, Loader]:
    found: dict[str, Loader] = {"tl_persona": ours, "json.loads of every line": every_line}
    if importlib.util.find_spec("persona_data") and importlib.util.find_spec("orjson"):
        found |= {"persona-data, first run": persona_data_without_its_pickle, "persona-data, later runs": persona_data}
    return found


def test_the_first_persona_out_of_a_large_file(dataset: tuple[Path, Path]) -> None:
    persona_id = "person-0000"
    expected = every_line(*dataset, persona_id)  # also puts the file into the system's cache, for all alike
    assert len(expected) > 100
    best = dict.fromkeys(loaders(), float("inf"))
    for _ in range(ROUNDS):
        for name, load in loaders().items():
            begin = time.perf_counter()
            found = load(*dataset, persona_id)
            best[name] = min(best[name], time.perf_counter() - begin)
            assert found == expected, name
    size = dataset[1].stat().st_size / 1e6
    print(f"\nquestions of one persona ({len(expected):,} rows) out of {size:,.0f} MB")
    for name, seconds in best.items():
        print(f"{name:>26} {seconds:>8.3f} s {seconds / best['tl_persona']:>7.1f}x")
    assert best["tl_persona"] < best["json.loads of every line"]
