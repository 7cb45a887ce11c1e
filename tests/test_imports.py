"""What may import what: the package stays quick to import, and its modules depend on one another in one direction."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tl_persona"

STAGES = (
    "errors",
    "cards",
    "token_view",
    "tensors",
    "provenance",
    "files",
    "names",
    "locks",
    "jsonl",
    "records",
    "hub",
    "samples",
    "contrast_pair",
    "contrast_dataset",
    "contrast",
    "layout",
    "templates",
    "reading",
    "spans",
    "proofs",
    "prompts",
    "masks",
    "tries",
    "rows",
    "plan",
    "prepared",
    "verification",
    "hooks",
    "configs",
    "checkpoints",
    "models",
    "caches",
    "positions",
    "pass_tensors",
    "exactness",
    "backends",
    "backends.local",
    "backends.remote",
    "reducers",
    "spool",
    "directions",
    "separation",
    "statistics",
    "steering",
    "vector_reading",
    "rotalabs_files",
    "vector_files",
    "set_files",
    "layer_table",
    "export",
    "steering_vector",
    "vectors",
    "artifact",
    "manifest",
    "agreement",
    "description",
    "tables",
    "merging",
    "store",
    "sharding",
    "preview",
    "projection",
    "progress",
    "report",
    "jobs",
    "loading",
    "generation",
    "extraction",
    "caa",
    "commands",
    "parser",
    "cli",
    "__main__",
)
"""The modules in the order of the flow: each may import those above it. `__init__`, which names them all, is not here.

A part of a listed module (`backends.local.pooling`, say) stands where that module stands, and a package may import
its parts.
"""

MAY_IMPORT_A_BACKEND = {"jobs", "loading", "generation", "extraction", "caa", "commands", "cli"}
"""The recipes and the command line: the outermost layer."""

HOME_OF = {"transformer_lens": "backends.local", "nnsight": "backends.remote"}
"""The one backend that may import each of these, anywhere in it."""

HEAVY = {
    *("torch", "transformers", "transformer_lens", "nnsight", "httpx", "tenacity"),
    *("sklearn", "pandas", "plotly", "gguf"),
}


def _name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {_name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
EVERY_MODULE = pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])


def _stage(module: str) -> int | None:
    """Rank in `STAGES`; a module that is not listed stands where the listed module stands whose name begins its own."""
    owners = [stage for stage in STAGES if module == stage or module.startswith((f"{stage}.", f"{stage}_"))]
    return STAGES.index(max(owners, key=len)) if owners else None


def _imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, without the names taken from them."""
    found = set()
    for name in _imports(path):
        first, _, rest = name.partition(".")
        if first != "tl_persona":
            continue
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        found.add(rest or "__init__")
    return found


def _loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('loaded:', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("loaded:")[2].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert _loaded_after("import tl_persona").isdisjoint(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import runpy\nsys.argv = ['tl-persona', '--help']\n"
        "try:\n    runpy.run_module('tl_persona', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert _loaded_after(code).isdisjoint(HEAVY)


@EVERY_MODULE
def test_a_module_imports_only_from_earlier_stages(module: str) -> None:
    rank = _stage(module)
    assert rank is not None, f"{module}: give it a place in STAGES, after everything it imports"
    for imported in _own_imports(MODULES[module]):
        if imported == "__init__" or imported.startswith(f"{module}."):
            continue
        other = _stage(imported)
        assert other is not None and other <= rank, f"{module} imports {imported}, which comes later in the flow"


@EVERY_MODULE
def test_nothing_but_the_outermost_layer_imports_a_backend(module: str) -> None:
    if module.partition(".")[0] in {*MAY_IMPORT_A_BACKEND, "backends"}:
        return
    backends = {imported for imported in _own_imports(MODULES[module]) if imported.startswith("backends")}
    assert not backends


@EVERY_MODULE
@pytest.mark.parametrize("library", sorted(HOME_OF))
def test_a_hooking_library_is_imported_in_its_own_backend_only(module: str, library: str) -> None:
    imports_it = any(name.partition(".")[0] == library for name in _imports(MODULES[module]))
    assert not imports_it or module.startswith(HOME_OF[library])


def test_the_two_backends_do_not_know_each_other() -> None:
    for module, path in MODULES.items():
        if module.startswith("backends."):
            side = module.split(".")[1].split("_")[0]
            other = {"local": "backends.remote", "remote": "backends.local"}.get(side)
            assert other is None or not any(imported.startswith(other) for imported in _own_imports(path))
