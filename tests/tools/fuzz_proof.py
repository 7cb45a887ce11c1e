"""Runs random plans on the fake models of `fakes`: whatever is proven must pool within 1e-5 of each text alone.

No test: `python tests/tools/fuzz_proof.py --seeds 0:100000` runs a range of seeds, in as many processes as `--jobs`
says; without one, the 100,000 after the last of the table, and `--record` adds to it. Fails where a seed is wrong,
which `--seeds N:N+1` then runs alone.
"""

import argparse
import csv
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TABLE = Path(__file__).with_name("proof_ranges.csv")
COLUMNS = ("begin", "end", "wrong", "seconds", "fakes")
CHUNK, MORE = 500, 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description="run random plans on fake models")
    parser.add_argument("--seeds", help="a range, as 0:100000; default: on from the table")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--record", action="store_true", help=f"add the range to {TABLE.name}")
    parser.add_argument("--json", action="store_true", help="print what was seen as one line of JSON")
    chosen = parser.parse_args()
    begin, end = _range_of(chosen.seeds)
    began = time.monotonic()
    wrong: list[int] = []
    seen = Counter[str]()
    chunks = [(first, min(first + CHUNK, end)) for first in range(begin, end, CHUNK)]
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn"), _prepare) as pool:
        for done, (bad, counted) in enumerate(pool.map(_run, chunks), start=1):
            wrong += bad
            seen.update(counted)
            if not chosen.json and done % 20 == 0:
                print(f"{min(begin + done * CHUNK, end) - begin:,} of {end - begin:,}, {len(wrong)} wrong", flush=True)
    seconds = time.monotonic() - began
    if chosen.json:
        print(json.dumps({"wrong": wrong, "seen": seen}))
    else:
        print(f"seeds {begin}:{end}: {len(wrong)} wrong in {seconds:.0f} s {wrong[:20] or ''}")
    if chosen.record:
        _record(begin, end, len(wrong), seconds)
    return int(bool(wrong))


def _range_of(seeds: str | None) -> tuple[int, int]:
    if seeds:
        begin, end = seeds.split(":")
        return int(begin), int(end)
    rows = _rows()
    last = max((int(row["end"]) for row in rows if row["fakes"] == _digest()), default=0)
    return last, last + MORE


def _rows() -> list[dict[str, str]]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _record(begin: int, end: int, wrong: int, seconds: float) -> None:
    rows = [*_rows(), dict(zip(COLUMNS, map(str, (begin, end, wrong, round(seconds), _digest())), strict=True))]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _digest() -> str:
    """Of the module that draws the plans: a seed means the same as long as it is unchanged."""
    return hashlib.sha256((SUPPORT / "fakes.py").read_bytes()).hexdigest()[:12]


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.path[:0] = [str(SUPPORT), str(ROOT)]


def _run(chunk: tuple[int, int]) -> tuple[list[int], dict[str, int]]:
    from fakes import run_range

    wrong, seen = run_range(*chunk)
    return wrong, {f"{fault}: {sharing}": count for (fault, sharing), count in seen.items()}


if __name__ == "__main__":
    sys.exit(main())
