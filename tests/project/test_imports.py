"""What may import what: the package stays quick to import, and its places depend on one another in one direction."""

import subprocess
import sys

import pytest
from places import MODULES_TO_COME, PACKAGE, RANKS, TO_COME, circles, graph, imports, modules, place_of

MAY_IMPORT_A_BACKEND = {
    *("loading", "extraction", "caa", "steering", "generation", "projection"),
    *("doctor", "sweep", "traits", "cluster", "cli"),
}
"""What runs a model, or will."""

HOME_OF = {"transformer_lens": "backends.local", "nnsight": "backends.remote"}
"""The one backend that may import each of these, anywhere in it."""

HEAVY = {
    *("torch", "transformers", "transformer_lens", "nnsight", "httpx", "tenacity"),
    *("sklearn", "pandas", "plotly", "gguf"),
}

WITHOUT_TORCH = (
    *("checking", "store.folder", "store.header", "store.manifest", "store.manifest_files"),
    *("cli.main", "data.behaviors", "data.dataset", "models.checkpoints", "models.configs", "report"),
)
"""What is checked or asked before torch is loaded, or where there is none."""

MODULES = modules()
RANK = {place: rank for rank, places in enumerate(RANKS) for place in places}
EVERY_MODULE = pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])


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


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_does_without_torch_loads_none(module: str) -> None:
    assert "torch" not in _loaded_after(f"import tl_persona.{module}")


def test_every_place_has_one_rank() -> None:
    found = {place_of(module) for module in MODULES} - {"__init__"}
    assert found == set(RANK) - TO_COME, "give a new place its rank in places.py, above everything it imports"
    assert len(RANK) == sum(map(len, RANKS))


def test_the_top_of_the_package_stays_small() -> None:
    modules_at_the_top = {module for module in MODULES if place_of(module) == module} - {"__init__", "__main__"}
    modules_at_the_top -= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(modules_at_the_top | MODULES_TO_COME) <= 13


@EVERY_MODULE
def test_a_place_imports_places_of_lower_rank_only(module: str) -> None:
    place = place_of(module)
    for imported in graph()[module]:
        other = place_of(imported)
        assert other == place or RANK[other] < RANK[place], f"{module} imports {imported}, which is not below {place}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


@EVERY_MODULE
def test_only_what_runs_a_model_imports_a_backend(module: str) -> None:
    if place_of(module) in {*MAY_IMPORT_A_BACKEND, "backends"}:
        return
    assert not {imported for imported in graph()[module] if place_of(imported) == "backends"}


@EVERY_MODULE
@pytest.mark.parametrize("library", sorted(HOME_OF))
def test_a_hooking_library_is_imported_in_its_own_backend_only(module: str, library: str) -> None:
    imports_it = any(name.partition(".")[0] == library for name in imports(MODULES[module]))
    assert not imports_it or module.startswith(HOME_OF[library])


def test_the_two_backends_do_not_know_each_other() -> None:
    for side, other in (("local", "remote"), ("remote", "local")):
        for module in MODULES:
            if module.startswith(f"backends.{side}"):
                assert not {imported for imported in graph()[module] if imported.startswith(f"backends.{other}")}
