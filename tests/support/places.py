"""The places of the package, their ranks, and what imports what. Run as a program, it counts them.

python tests/support/places.py                       # of this checkout
python tests/support/places.py OTHER/tl_persona      # of another one, such as a `git worktree` of an older commit
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
PACKAGE = ROOT / "tl_persona"

RANKS = (
    ("errors", "display", "provenance"),
    ("files", "models", "tensors"),
    ("data", "hub", "plan", "statistics"),
    ("backends", "prompts", "store"),
    ("extraction", "loading", "steering"),
    ("vectors", "generation"),
    ("caa", "checking"),
    ("sweep", "space", "projection"),
    ("traits",),
    ("report", "doctor", "cluster"),
    ("cli",),
    ("__main__",),
)
"""The places from the ground up; each may import those of lower rank only. A place is a subpackage or a module
at the top of the package. `__init__`, which offers names of all of them, is none."""

TO_COME = {"sweep", "space", "projection", "traits", "doctor", "cluster"}
"""Places that have their rank and are not there yet."""

MODULES_TO_COME = {"doctor", "cluster"}
"""Those of them that will be a module, and not a subpackage."""


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """A module's name within the package."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def modules(package: Path = PACKAGE) -> Mapping[str, Path]:
    """Every module by its name."""
    return {name_of(path, package): path for path in sorted(package.rglob("*.py"))}


def place_of(module: str) -> str:
    """The place that a module is, or lies in."""
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def graph(package: Path = PACKAGE) -> Mapping[str, set[str]]:
    """For every module the modules of the package that it imports; `__init__` does not count, which has the version."""
    found: dict[str, set[str]] = {}
    for module, path in modules(package).items():
        if module == "__init__":
            continue
        found[module] = set()
        for name in imports(path):
            first, _, rest = name.partition(".")
            if first != "tl_persona":
                continue
            while rest and rest not in modules(package):
                rest = rest.rpartition(".")[0]
            if rest and rest != module:
                found[module].add(rest)
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or round about."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in numbers:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], numbers[other])
        if lowest[module] == numbers[module]:
            place = stack.index(module)
            if len(stack) > place + 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for module in edges:
        if module not in numbers:
            visit(module)
    return found


def longest_chain(edges: Mapping[str, set[str]]) -> int:
    """How many modules the longest chain of imports has; a circle counts as one."""
    groups = circles(edges)
    group_of = {module: f"circle {n}" for n, group in enumerate(groups) for module in group}
    joined: dict[str, set[str]] = {}
    for module, others in edges.items():
        own = group_of.get(module, module)
        joined.setdefault(own, set()).update({group_of.get(other, other) for other in others} - {own})

    @cache
    def length(module: str) -> int:
        return 1 + max(map(length, joined[module]), default=0)

    return max(map(length, joined))


def figures(package: Path = PACKAGE) -> dict[str, object]:
    """What is counted before and after a move."""
    edges, files = graph(package), modules(package)
    between = {
        (module.split(".")[0], other.split(".")[0])
        for module, others in edges.items()
        for other in others
        if module.split(".")[0] != other.split(".")[0]
    }
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in files.values())
    top = [module for module in edges if "." not in module and files[module].name != "__init__.py"]
    return {
        "files": len(files),
        "lines": sum(lines),
        "median and largest module": f"{lines[len(lines) // 2]}, {lines[-1]}",
        "places": len({module.split(".")[0] for module in edges}),
        "of them modules": len(top),
        "imports between places": len(between),
        "imports between modules": sum(map(len, edges.values())),
        "longest chain of imports": longest_chain(edges),
        "circles": len(circles(edges)),
    }


if __name__ == "__main__":
    for what, figure in figures(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE).items():
        print(f"{what}: {figure}")
