"""Feeds the targets of `fuzzing` with what atheris makes of their seeds, guided by the branches it reaches.

No test: `python tests/tools/fuzz_atheris.py [SECONDS] [TARGET ...]` gives each target its seconds, in a process of its
own, and stops at the first input that gets anything but this package's own errors out of it. That input stays in the
file whose name is printed; a target given with `--input FILE` is fed with that once more.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

MEGABYTES, SECONDS_AN_INPUT, LONGEST_INPUT = 4096, 30, 1 << 16


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz everything that is read from files")
    parser.add_argument("seconds", nargs="?", type=int, default=60, help="for each target")
    parser.add_argument("targets", nargs="*", help="default: all of them")
    parser.add_argument("--input", type=Path, help="feed the one target with this file, without atheris")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.input is not None:
        return _again(chosen.targets[0], chosen.input)
    if chosen.one:
        return _fuzz(chosen.targets[0], chosen.seconds)
    for target in chosen.targets or _targets():
        print(f"== {target}: {chosen.seconds} s", flush=True)
        done = subprocess.run([sys.executable, __file__, "--one", str(chosen.seconds), target], check=False)
        if done.returncode:
            return done.returncode
    return 0


def _targets() -> list[str]:
    from fuzzing import TARGETS

    return list(TARGETS)


def _again(target: str, path: Path) -> int:
    from fuzzing import feed

    with tempfile.TemporaryDirectory() as folder:
        feed(target, Path(folder), path.read_bytes())
    return 0


def _fuzz(target: str, seconds: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["tl_persona"]):
        from fuzzing import feed, seeds

    scratch = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, data in enumerate(seeds(target, Path(folder, "seeds"))):
            (corpus / str(number)).write_bytes(data)
        found = Path(tempfile.gettempdir(), f"fuzz-{target.replace(' ', '-')}-")
        options = [
            f"-max_total_time={seconds}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-timeout={SECONDS_AN_INPUT}",
            f"-max_len={LONGEST_INPUT}",
            f"-artifact_prefix={found}",
            "-print_final_stats=1",
            "-verbosity=0",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: feed(target, Path(folder, "fed"), data))
        atheris.Fuzz()  # Ends the process.
    return 0


if __name__ == "__main__":
    sys.exit(main())
