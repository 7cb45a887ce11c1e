"""Mutation testing: which small changes to a module does no test notice?

Makes the changes with mutmut's operators, to whole modules: methods behind decorators and constants too, which mutmut
itself leaves out. Each mutant runs in a fork of one process that has torch loaded, so nothing is written to the
package. Left alone are annotations, docstrings and what is raised: a message's wording is no behaviour.

    python tests/tools/mutants.py prompts.masks [--sample 200] [--only 17 23]
"""

import argparse
import difflib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import libcst as cst
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "prompts.masks": ["prompts/test_masks.py"],
    "plan.plan": ["plan/test_plan.py", "plan/test_prefixes.py"],
    "plan.rows": ["plan/test_plan.py", "plan/test_prefixes.py"],
    "prompts.prepare": ["prompts/test_prompts.py", "prompts/test_verify.py"],
    "prompts.template": ["prompts/test_template.py", "prompts/test_prompts.py"],
    "store.core": [
        *("store/test_store.py", "store/test_store_damage.py", "store/test_store_limits.py"),
        "recipes/test_checking.py",
    ],
}
"""The tests of each module that need no model; `-k` leaves out those that take seconds."""
LEFT_OUT = "not thousands and not smollm2"
SECONDS = 60
"""A mutant that takes longer has made a loop endless, which the suite would notice too."""


def _source(name: str) -> Path:
    return ROOT / "tl_persona" / f"{name.replace('.', '/')}.py"


class _Mutants(cst.CSTVisitor):
    """Collects pairs of a node and what it may become."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Raise | cst.Import | cst.ImportFrom | cst.Decorator):
            return False
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changed = list(operator(node))
                # One change of a text shows whether a test reads it.
                self.found += [(node, each) for each in (changed[:1] if kind is cst.BaseString else changed)]
        return True


def mutants(source: str) -> Iterator[str]:
    """The sources with one change each that still compile."""
    module = cst.parse_module(source)
    visitor = _Mutants()
    module.visit(visitor)
    for old, new in visitor.found:
        code = module.deep_replace(old, new).code  # type: ignore[arg-type]
        try:
            compile(code, "mutant", "exec")
        except SyntaxError:
            continue
        if code != source:
            yield code


class _Mutant(MetaPathFinder, Loader):
    """Gives one module of the package another source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        return spec_from_loader(fullname, self, origin=str(self._path))

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self._path)
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)


class _PropertiesLast:
    """Has the tests that try one example come first: they take milliseconds."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: hasattr(item.function, "hypothesis"))


def outcome(name: str, source: str) -> str:
    """`killed` with the first test that failed, `timeout` or `survived`, of the tests of a module."""
    # A file and no pipe: a process that a test has started may outlive a mutant that is stopped.
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - the child has it too
    child = os.fork()
    if not child:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        signal.alarm(SECONDS)
        sys.meta_path.insert(0, _Mutant(f"tl_persona.{name}", _source(name), source))
        import pytest

        tests = [str(ROOT / "tests" / test) for test in TESTS[name]]
        plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-profile=few"]
        options = ["-x", "-q", "--no-header", "--tb=no", *plugins]
        code = pytest.main([*options, "-m", "not slow and not tl", "-k", LEFT_OUT, *tests], plugins=[_PropertiesLast()])
        sys.stdout.flush()
        os._exit(int(code))
    status = os.waitpid(child, 0)[1]
    output.seek(0)
    lines = output.read().splitlines()
    output.close()
    if os.WIFSIGNALED(status):
        return "timeout"
    if os.WEXITSTATUS(status) == 0:
        return "survived"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "killed by " + (failed[0].split(" - ")[0] if failed else str(lines[-3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--sample", type=int, help="run this many mutants, chosen at random but always the same")
    parser.add_argument("--only", type=int, nargs="+", help="run these mutants")
    parser.add_argument("--examples", type=int, default=15, help="of each property that names no number of its own")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    os.chdir(ROOT)
    import beartype  # noqa: F401  before anything that imports nnsight
    import hypothesis
    import pytest  # noqa: F401
    import tokenizer_kinds  # noqa: F401  and with it transformers
    import torch

    (torch.ones(2, device="meta") > 0) & (torch.arange(2, device="meta") == 1)  # loads what the meta device needs

    hypothesis.settings.register_profile(
        "few",
        deadline=None,
        max_examples=arguments.examples,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
    )
    path = _source(arguments.module)
    source = path.read_text(encoding="utf-8")
    all_sources = list(dict.fromkeys(mutants(source)))
    chosen = list(range(len(all_sources)))
    if arguments.sample is not None:
        chosen = sorted(random.Random(0).sample(chosen, min(arguments.sample, len(chosen))))
    chosen = chosen if arguments.only is None else arguments.only
    assert outcome(arguments.module, source) == "survived", "the tests fail without any change"
    counts: dict[str, int] = {}
    for number in chosen:
        start = time.monotonic()
        verdict = outcome(arguments.module, all_sources[number])
        counts[verdict.split()[0]] = counts.get(verdict.split()[0], 0) + 1
        print(f"{number} {verdict} ({time.monotonic() - start:.1f} s)", flush=True)
        if verdict == "survived":
            diff = difflib.unified_diff(source.splitlines(), all_sources[number].splitlines(), lineterm="", n=0)
            print("\n".join(list(diff)[2:]), flush=True)
    print(f"{arguments.module}: {counts} of {len(all_sources)} mutants")


if __name__ == "__main__":
    main()
