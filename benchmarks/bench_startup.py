"""How long a user waits before anything happens: `import tl_persona` and `tl-persona --help`, beside `import torch`.

Whole processes, the start of Python included, run in turn; the best of several is told.
"""

import subprocess
import sys
from functools import partial

from machine import timed
from peer import ROOT

ROUNDS = 5
PROGRAMS = {
    "import torch": ["-c", "import torch; print(torch.__name__)"],
    "import tl_persona": ["-c", "import tl_persona; print(tl_persona.__name__)"],
    "tl-persona --help": ["-m", "tl_persona", "--help"],
    "Python alone": ["-c", "print('python')"],
}
PRINTED = {"import torch": "torch", "import tl_persona": "tl_persona", "tl-persona --help": "extract"}


def run(name: str) -> None:
    """Starts one of the programs and makes sure that it did what is timed."""
    done = subprocess.run([sys.executable, *PROGRAMS[name]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert PRINTED.get(name, "python") in done.stdout, name


def test_importing_the_package_and_asking_for_help() -> None:
    for name in PROGRAMS:  # compiles what was not compiled yet, and puts files into the system's cache
        run(name)
    best = dict.fromkeys(PROGRAMS, float("inf"))
    for _ in range(ROUNDS):
        for name in PROGRAMS:
            best[name] = min(best[name], timed(partial(run, name)))
    print(f"\nwhole processes, best of {ROUNDS}")
    for name, seconds in best.items():
        print(f"  {name:18} {seconds:6.3f} s   {seconds / best['import torch']:.2f} of import torch")
    assert max(best["import tl_persona"], best["tl-persona --help"]) < best["import torch"]
