"""Every public name says what it is: meaning, shapes of tensors, what it raises, and an example that runs.

Signatures and docstrings are read, nothing is run but the examples: those in docstrings by `--doctest-modules` in the
whole suite and by name here, those on pages by `test_docs`, `test_tutorial` and the notebook's test.
"""

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jaxtyping import Float

import tl_persona

ROOT = Path(__file__).resolve().parents[2]

SHOWN_ON_A_PAGE = {
    "load_model": "README.md",
    "check_model": "docs/concepts/exactness.md",
    "extract_activations": "docs/concepts/hooks.md",
    "run_extraction": "README.md",
    "extract_caa_vector": "README.md",
    "extract_caa_vectors": "docs/concepts/steering-vectors.md",
    "attach": "docs/concepts/steering.md",
    "generate": "README.md",
    "monitor": "docs/concepts/steering.md",
    "prepare_inputs": "docs/concepts/masks.md",
    "PreparedInput": "docs/concepts/masks.md",
    "ExtractionResult": "docs/how-to/from-persona-vectors.md",
    "project_text": "docs/how-to/look-at-vectors.md",
    "verify": "docs/how-to/own-personas.md",
}
"""What needs a model or a tokenizer to be shown: no docstring builds one. The page runs in the tests."""

NO_EXAMPLE_OF_ITS_OWN = {
    "TLPersonaError": "a base class, never raised itself",
    **{f"load_{behavior}_pairs": f"load_pairs({behavior!r}) by another name" for behavior in tl_persona.BEHAVIORS},
}


NEEDS_SOMETHING_ELSE = {
    "SteeringVectorSet.to_steering_vectors": "steering-vectors; tests/vectors/test_conversions.py runs it",
    "SteeringVectorSet.from_steering_vectors": "steering-vectors; tests/vectors/test_conversions.py runs it",
    "SteeringVectorSet.to_repeng": "repeng; tests/vectors/test_conversions.py runs it",
    "SteeringVectorSet.from_repeng": "repeng; tests/vectors/test_conversions.py runs it",
    "SteeringVectorSet.push_to_hub": "a hub; tests/recipes/test_hub_upload.py has a stand-in",
    "SteeringVectorSet.from_hub": "a hub; tests/recipes/test_hub_upload.py has a stand-in",
    "PersonaVectorStore.push_to_hub": "a hub; tests/recipes/test_hub_upload.py has a stand-in",
    "PersonaVectorStore.from_hub": "a hub; tests/recipes/test_hub_upload.py has a stand-in",
}
"""Methods without an example that runs: what they need, and where they run."""


def _objects() -> dict[str, Any]:
    found = {name: getattr(tl_persona, name) for name in tl_persona.__all__}
    return {name: value for name, value in found.items() if inspect.isclass(value) or callable(value)}


def _inner(value: Any) -> Callable[..., Any] | None:
    """The function behind a method, class method or property of this package."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    ours = inspect.isfunction(value) and inspect.unwrap(value).__module__.startswith("tl_persona")
    return inspect.unwrap(value) if ours else None


def _members() -> dict[str, Callable[..., Any]]:
    """Public methods and properties of the public classes, those of base classes in this package too."""
    found = {}
    for name, value in _objects().items():
        if not inspect.isclass(value):
            continue
        for base in value.__mro__:
            if not base.__module__.startswith("tl_persona"):
                continue
            for member, raw in vars(base).items():
                inner = _inner(raw)
                if inner is not None and not member.startswith("_"):
                    found.setdefault(f"{name}.{member}", inner)
    return found


OBJECTS, MEMBERS = _objects(), _members()
FUNCTIONS = {name: inspect.unwrap(value) for name, value in OBJECTS.items() if not inspect.isclass(value)} | MEMBERS
EVERYTHING = OBJECTS | MEMBERS


def _doc(value: Any) -> str:
    return inspect.getdoc(value) or ""


def _has_example(value: Any) -> bool:
    return bool(doctest.DocTestParser().get_examples(_doc(value)))


def _raised_in(function: Callable[..., Any]) -> set[str]:
    """Names of this package's errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2] for node in nodes}
    return {name for name in names if name in vars(tl_persona.errors)}


def _mentions_shape(text: str) -> bool:
    return bool(re.search(r"\(\s*(\w+,\s*)*(d_model|pos|layer|batch|hook|pair|persona|row)\b[\w\s,]*\)|scalar", text))


def test_the_check_looks_at_something() -> None:
    assert {"run_extraction", "SteeringVector.save", "PersonaVectorStore.load"} <= set(FUNCTIONS)
    assert _raised_in(FUNCTIONS["load_pairs"]) == {"InputError"}
    assert _is_bare_tensor(torch.Tensor) and _is_bare_tensor(Sequence[torch.Tensor])
    assert not _is_bare_tensor(Float[torch.Tensor, "pos"]) and not _is_bare_tensor(int)
    assert _mentions_shape("float32, shape (layer, d_model)") and not _mentions_shape("the vector (see below)")


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_public_name_has_a_docstring(name: str) -> None:
    text = _doc(EVERYTHING[name])
    assert text, f"{name} has no docstring"
    assert text.splitlines()[0].endswith((".", ":")), f"{name}: the first line is a sentence"


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if _raised_in(FUNCTIONS[name])])
def test_what_a_function_raises_is_documented(name: str) -> None:
    text = _doc(FUNCTIONS[name])
    section = text.partition("Raises:")[2]
    for error in _raised_in(FUNCTIONS[name]):
        assert error in section, f"{name} raises {error} and does not say so"


def _handles_tensors(function: Callable[..., Any]) -> bool:
    return any("Tensor" in str(kind) or "LayerVectors" in str(kind) for kind in function.__annotations__.values())


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if _handles_tensors(FUNCTIONS[name])])
def test_tensors_have_their_shape_in_the_annotation_or_the_docstring(name: str) -> None:
    function = FUNCTIONS[name]
    bare = [part for part, kind in function.__annotations__.items() if _is_bare_tensor(kind)]
    assert not bare or _mentions_shape(_doc(function)), f"{name}: say which shape {', '.join(bare)} has"


def _is_bare_tensor(kind: Any) -> bool:
    """True for a tensor without axes: `torch.Tensor`, also in a union or a list."""
    text = kind if isinstance(kind, str) else str(kind)
    return bool(re.search(r"(?<![\w.\[])(torch\.)?Tensor(?!\w|,\s*['\"])|\[torch\.Tensor|class 'torch\.Tensor'", text))


@pytest.mark.parametrize("name", OBJECTS)
def test_a_class_or_function_has_an_example_that_runs(name: str) -> None:
    if name in NO_EXAMPLE_OF_ITS_OWN:
        assert not _has_example(OBJECTS[name]), f"{name} has an example now: take it off the list"
    elif name in SHOWN_ON_A_PAGE:
        page = (ROOT / SHOWN_ON_A_PAGE[name]).read_text(encoding="utf-8")
        wanted = {"PreparedInput": "prepare_inputs", "ExtractionResult": "run_extraction"}.get(name, name)
        assert re.search(rf"^(>>>|\.\.\.) .*\b{wanted}\b", page, re.MULTILINE), f"{SHOWN_ON_A_PAGE[name]}: no {wanted}"
    else:
        assert _has_example(OBJECTS[name]), f"{name} needs an example in its docstring"


def _shown() -> str:
    """All code that runs as an example: sessions in docstrings and on pages, the tutorial, the notebook."""
    sources = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("tl_persona/**/*.py")]
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    sessions = [line for line in lines if line.lstrip().startswith((">>> ", "... "))]
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return "\n".join([*sessions, *re.findall(r"^```python\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)])


SHOWN = _shown()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_method_or_property_is_used_in_some_example_that_runs(name: str) -> None:
    member = name.partition(".")[2]
    if name in NEEDS_SOMETHING_ELSE:
        test = re.search(r"tests/[\w/]+\.py", NEEDS_SOMETHING_ELSE[name])
        assert test and f".{member}(" in (ROOT / test[0]).read_text(encoding="utf-8"), f"{name} does not run there"
    else:
        assert re.search(rf"\.{member}\b", SHOWN), f"no example that runs uses {name}"


def test_examples_on_pages_are_listed_for_names_that_exist() -> None:
    assert set(SHOWN_ON_A_PAGE) | set(NO_EXAMPLE_OF_ITS_OWN) <= set(OBJECTS)
    assert set(NEEDS_SOMETHING_ELSE) <= set(MEMBERS)


@pytest.mark.parametrize("name", [name for name in EVERYTHING if _has_example(EVERYTHING[name])])
def test_an_example_in_a_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = EVERYTHING[name]
    home: ModuleType | None = inspect.getmodule(value)
    assert home is not None
    example = doctest.DocTestParser().get_doctest(_doc(value), dict(vars(home)), name, None, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    tables = {name for row in re.findall(r"^\|(.*?)\|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert tables == set(tl_persona.__all__), "docs/reference/api.md lists other names"
    documented = set(re.findall(r"^::: tl_persona\.(\w+)$", page, re.MULTILINE)) - {"errors"}
    plain = {name for name in tl_persona.__all__ if name not in OBJECTS}
    assert documented == set(OBJECTS) - plain - set(NO_EXAMPLE_OF_ITS_OWN)
