"""The rules of the rooms: their sizes, what they say of themselves, their faces, and the names in them."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from places import PACKAGE, ROOT, graph, modules

import tl_persona

LEAST, MOST = 60, 400
"""Lines of a module. A shorter one with one importer belongs to that; a longer one has a second idea."""

MAY_BE_OF_ANOTHER_SIZE = {
    "prompts.template": "one idea, walked to and fro: what a template makes of contents, and how that is read",
    "vectors.vector_set": "one class; its ways to other programs are short, and many",
}
"""At most five, with their reasons."""

MAY_STAND_TWICE = {"data", "files", "inputs", "layers", "personas"}
"""Last names that stand in two places, at most five. Others do where a command has the name of what it calls, and where
both backends have the same part."""

SUBPACKAGES = sorted(name for name, path in modules().items() if path.name == "__init__.py" and name != "__init__")
FACES = sorted(stub.parent for stub in PACKAGE.rglob("__init__.pyi"))
FILES = {name: path for name, path in modules().items() if path.name != "__init__.py"}


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _importers() -> dict[str, set[str]]:
    found = defaultdict(set)
    for module, others in graph().items():
        for other in others:
            found[other].add(module)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, target in scripts.items():
        found[target.partition(":")[0].removeprefix("tl_persona.")].add(name)
    return found


# Sizes


def test_no_module_is_longer_than_one_idea() -> None:
    long = {name for name, path in FILES.items() if _lines(path) > MOST}
    assert long == set(MAY_BE_OF_ANOTHER_SIZE), f"more than {MOST} lines, or an exception that is none any more"
    assert len(MAY_BE_OF_ANOTHER_SIZE) <= 5


def test_a_short_module_has_more_than_one_importer_or_none() -> None:
    importers = _importers()
    short = {name: importers[name] for name, path in FILES.items() if _lines(path) < LEAST}
    assert {name: found for name, found in short.items() if len(found) == 1} == {}, "put them into their importer"


# What a room says of itself


def _listed(docstring: str) -> list[str]:
    """The names before the colons of a list, of which a line may have several: - `a`, `b`: text. `c`: text."""
    entries = re.findall(r"^- (.*?)(?=^- |^$|\Z)", docstring, re.MULTILINE | re.DOTALL)
    groups = [re.findall(r"(?:^|\. )((?:`\w+`(?:, )?)+):", " ".join(entry.split())) for entry in entries]
    return [name for entry in groups for group in entry for name in re.findall(r"`(\w+)`", group)]


@pytest.mark.parametrize("room", SUBPACKAGES)
def test_the_docstring_of_a_room_lists_its_files(room: str) -> None:
    path = modules()[room]
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    files = {item.stem for item in path.parent.glob("*.py")} - {"__init__"}
    files |= {item.parent.name for item in path.parent.glob("*/__init__.py")}
    listed = _listed(docstring)
    assert sorted(listed) == sorted(files)
    assert "Declined:" in docstring, f"{room}: say what it declines"
    order = [name for name in listed if f"{room}.{name}" in graph()]
    for place, name in enumerate(order):
        later = {f"{room}.{other}" for other in order[place + 1 :]}
        assert not graph()[f"{room}.{name}"] & later, f"{room}: {name} is to be read after what it imports"


def test_the_docstring_of_the_package_lists_its_places() -> None:
    docstring = tl_persona.__doc__ or ""
    places = {name.partition(".")[0] for name in modules()} - {"__init__", "__main__"}
    below = re.search(r"Below them lie (.*?), which", docstring, re.DOTALL)
    assert below is not None
    assert {*_listed(docstring), *re.findall(r"`(\w+)`", below[1])} == places


@pytest.mark.parametrize("room", [*SUBPACKAGES, "__init__"])
def test_a_room_defines_nothing_but_its_face(room: str) -> None:
    path = modules()[room]
    body = ast.parse(path.read_text(encoding="utf-8")).body[1:]
    has_face = path.with_suffix(".pyi").exists()
    face = ["import lazy_loader", "__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)"]
    found = [
        ast.unparse(node).replace("(__getattr__, __dir__, __all__)", "__getattr__, __dir__, __all__") for node in body
    ]
    version = [f"__version__ = {tl_persona.__version__!r}"] if room == "__init__" else []
    assert found == ([face[0], *version, face[1]] if has_face else [])


# Faces


@pytest.mark.parametrize("folder", FACES, ids=lambda folder: folder.name)
def test_every_name_of_a_stub_is_there_and_public(folder: Path) -> None:
    package = import_module(".".join(folder.relative_to(ROOT).parts))
    body = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8")).body
    offered = [
        (node.module, alias)
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.level == 1
    ]
    assert all(alias.name == alias.asname and not alias.name.startswith("_") for _, alias in offered)
    assert sorted(alias.name for _, alias in offered) == sorted(package.__all__)
    for module, alias in offered:
        value = getattr(package, alias.name)
        assert value is vars(import_module(f"{package.__name__}.{module}"))[alias.name]
        if inspect.isclass(value) or inspect.isfunction(value):
            home = f"{package.__name__}.{module}"
            assert inspect.unwrap(value).__module__ == home or alias.name in MAY_BE_PASSED_ON, (
                f"{alias.name}: name its home"
            )


MAY_BE_PASSED_ON = {"Sample": "a plan is made of samples, and masks lie below plans"}
"""Names that a face offers and another place defines: a stub can name its own package's modules only."""


def test_a_name_that_is_called_as_its_module_stays_a_function() -> None:
    code = "import tl_persona.steering.monitor\nfrom tl_persona.steering import monitor\nassert callable(monitor)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_the_recipe_offers_is_what_it_offered() -> None:
    from tl_persona import extraction

    assert set(extraction.__all__) == {
        *("ExtractionResult", "MaskStrategy", "OnStatus", "PreparedInput"),
        *("extract_activations", "prepare_inputs", "run_extraction"),
    }


# Names


def test_a_last_name_stands_once() -> None:
    commands = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - {"main", "arguments", "inputs"}
    places: defaultdict[str, set[str]] = defaultdict(set)
    for name in FILES:
        room, _, last = name.rpartition(".")
        if last == room.rpartition(".")[2] or (room == "cli" and last in commands):
            continue  # what a room is about, and a command, are called as they are
        places[last].add(name.replace("backends.local.", "backends.").replace("backends.remote.", "backends."))
    twice = {last for last, names in places.items() if len(names) > 1 or (last in SUBPACKAGES and names)}
    assert twice <= MAY_STAND_TWICE and len(MAY_STAND_TWICE) <= 5


def test_a_prefix_that_three_files_share_is_a_folder() -> None:
    prefixes = Counter(
        (name.rpartition(".")[0], name.rpartition(".")[2].partition("_")[0])
        for name in FILES
        if "_" in name.rpartition(".")[2]
    )
    assert [prefix for prefix, count in prefixes.items() if count > 2 and prefix[1]] == []


# Pointers


def _docstrings() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield path, node.value.value


def _is_there(dotted: str, path: Path) -> bool:
    """Whether a dotted name is a module or what one has, from the file's own folder or from the package's top."""
    dotted = dotted.removeprefix("tl_persona.")
    for folder in (path.parent, *path.parent.parents):
        if folder == ROOT:
            return False
        prefix = ".".join(folder.relative_to(ROOT).parts)
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            name = ".".join([prefix, *parts[:length]]).removeprefix("tl_persona.")
            if name in modules():
                value = import_module(f"tl_persona.{name}")
                for part in parts[length:]:
                    value = getattr(value, part, None)
                if value is not None:
                    return True
    return False


def _identifiers() -> set[str]:
    """Every name, attribute, argument and word of a text in the package's code, docstrings left out."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name", "asname", "module"):
                value = getattr(node, field, None)
                if isinstance(value, str):
                    found |= set(re.findall(r"\w+", value))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found |= set(re.findall(r"\w+", node.value))
    return found


OF_OTHERS = {
    *("math", "torch", "numpy", "json", "time", "pandas", "plotly", "repeng", "steering_vectors", "transformers"),
    *("blocks", "direction", "module", "model", "metadata", "manifest", "layer_N", "srun"),
}
"""What a pointer may begin with beside names of this package: other libraries, hook names, and files that are saved."""

OF_FILES = (
    ".pyi",
    ".json",
    ".jsonl",
    ".html",
    ".css",
    ".js",
    ".md",
    ".pending",
    ".safetensors",
    ".pt",
    ".gguf",
    ".times",
)


def test_what_a_docstring_points_to_is_there() -> None:
    wrong = []
    for path, text in _docstrings():
        works = re.findall(r"`([a-z_][\w.]*)`(?:'s|') (?:work|own)|(?:is|are) `([a-z_][\w.]*)`(?:'s|')", text)
        works += [(name, "") for name in re.findall(r"\b(?:is|are|that) (?:the )?work of `([a-z_][\w.]*)`", text)]
        pointers = [first or second for first, second in works]
        dotted = re.findall(r"`([a-z_]\w*(?:\.[A-Za-z_]\w*)+)`", text)
        pointers += [name for name in dotted if not name.endswith(OF_FILES) and name.split(".")[0] not in OF_OTHERS]
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in pointers if not _is_there(name, path)]
        wrong += [
            f"{path.relative_to(ROOT)}: {name}"
            for name in re.findall(r"`((?:docs|tests|tl_persona)/[\w./-]+)`", text)
            if not (ROOT / name).exists()
        ]
    assert not wrong, "\n".join(wrong)


def test_a_word_in_backticks_is_one_of_the_code_or_a_place() -> None:
    known = _identifiers() | {part for name in modules() for part in name.split(".")} | WORDS_OF_OTHERS
    known |= {item.name for folder in (PACKAGE, PACKAGE / "data") for item in folder.iterdir()}
    wrong = [
        f"{path.relative_to(ROOT)}: {word}"
        for path, text in _docstrings()
        for word in re.findall(r"`([a-z]\w+)`", text)
        if word not in known
    ]
    assert not wrong, "\n".join(wrong)


WORDS_OF_OTHERS = {"ada", "hf_generate", "register_forward_hook", "tool_use"}
"""Words in backticks that are of other programs, and of no code here."""


# What is built


@pytest.mark.slow
def test_the_wheel_holds_what_the_checkout_has_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tl_persona/")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == there
