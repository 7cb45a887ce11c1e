"""What objects show of themselves in notebooks and rich consoles, and a text shaded by its projections."""

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from tl_persona import prepare_inputs
from tl_persona.data.personas import QAPair
from tl_persona.display import token_texts
from tl_persona.errors import InputError
from tl_persona.steering.text import TextProjection, project_text
from tl_persona.store import PersonaVectorStore
from tl_persona.vectors import SteeringVector, SteeringVectorSet

HOSTILE = "<script>alert(1)</script>&'\""
VOID = {"br", "img", "meta", "link", "input"}


class Page(HTMLParser):
    """The text of some HTML and its elements, which must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.elements, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("th", "td", "strong") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(shown: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=False).print(shown)
    return out.getvalue()


def vector(layer: int = 1, behavior: str = "calm") -> SteeringVector:
    metadata = {
        "num_pairs": 12,
        "token_position": "last",
        "statistics": {"auc": 0.912, "auc_low": 0.8, "auc_high": 0.99, "split_half": 0.5, "agreement": 0.75},
    }
    return SteeringVector(behavior, layer, torch.tensor([3.0, 4.0]), "org/model", "caa", metadata)


@pytest.mark.parametrize("fact", ["blocks.1.hook_resid_post", "org/model", "2 d_model, float32", "12", "caa", "last"])
def test_a_vector_tells_its_facts_in_a_notebook_and_in_a_console(fact: str) -> None:
    assert fact in Page(vector()._repr_html_()).text
    assert fact in printed(vector())


def test_a_vector_tells_its_norm_and_its_separation_with_the_interval() -> None:
    for shown in (Page(vector()._repr_html_()).text, printed(vector())):
        assert re.search(r"norm\s*5\b", shown) and "0.91 [0.80, 0.99]" in shown


def test_a_vector_without_statistics_leaves_them_out() -> None:
    bare = SteeringVector("calm", 0, torch.ones(2), "tiny")
    assert "AUC" in printed(vector()) and "AUC" not in printed(bare)


def test_a_set_shows_a_row_for_each_layer() -> None:
    vectors = SteeringVectorSet("calm", [vector(1), vector(2)])
    page = Page(vectors._repr_html_())
    assert "steering vectors for calm" in page.text
    for layer in (1, 2):
        assert f"blocks.{layer}.hook_resid_post" in page.text and f"blocks.{layer}.hook_resid_post" in printed(vectors)


def test_an_empty_set_is_shown_too() -> None:
    assert "0: []" in printed(SteeringVectorSet("calm")) and "0: []" in SteeringVectorSet("calm")._repr_html_()


def test_names_are_text_and_never_markup() -> None:
    hostile = SteeringVectorSet(HOSTILE, [vector(1, HOSTILE)])
    for shown in (hostile, hostile[1]):
        page = Page(shown._repr_html_())
        assert HOSTILE in page.text and "script" not in {tag for tag, _ in page.elements}
        assert HOSTILE in printed(shown)
    assert "[b]x[/b]" in printed(vector(1, "[b]x[/b]"))


def test_a_store_tells_what_each_variant_holds(tmp_path: Path) -> None:
    with PersonaVectorStore("org/model", tmp_path) as store:
        for name in ("ada", "bo"):
            store.save("templated", name, name, torch.ones(3, 4), ["q"])
    for shown in (Page(store._repr_html_()).text, printed(store)):
        assert "persona vectors of org/model" in shown and str(tmp_path) in shown and "answer_mean" in shown
        assert re.search(r"templated\s*2 personas, 3 layers", shown)
        assert re.search(r"biography\s*nothing stored", shown)


def test_a_store_that_cannot_be_read_says_so_and_raises_nothing(tmp_path: Path) -> None:
    store = PersonaVectorStore("org/model", tmp_path / "store", variants=["templated"])
    (tmp_path / "elsewhere").mkdir()
    store.path_of("templated", "x").parent.parent.mkdir(parents=True)
    store.path_of("templated", "x").parent.symlink_to(tmp_path / "elsewhere")
    assert "cannot be read" in printed(store) and "cannot be read" in store._repr_html_()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_prepared_input_shows_its_text_and_marks_the_selected_tokens(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    pair = QAPair("q<1>", "explicit", "frq", "individual", "Where do you live?", "By the sea. 🌊")
    (prepared,) = prepare_inputs(tokenizer, "You are Mara, a keeper.", [pair])
    page = Page(prepared._repr_html_())
    shown = prepared.prompt_text.replace("\n", "↵\n")
    assert shown in page.text and shown in printed(prepared)
    assert f"{int(prepared.token_mask.sum())} of {len(prepared.input_ids)} tokens" in page.text
    marked = sum("background" in (attributes.get("style") or "") for _, attributes in page.elements)
    assert marked - 1 == int(prepared.token_mask.sum())  # one more: the box behind the text
    assert sum("persona" in (attributes.get("title") or "") for _, attributes in page.elements) == (
        prepared.spans.template.token_end - prepared.spans.template.token_start
    )


def test_token_texts_join_to_the_text_they_cut() -> None:
    text = "ab  cdé f"
    cut = [(0, 1), (1, 2), (4, 6), (6, 7), (6, 7), (0, 0), (8, 9)]
    assert "".join(gap + token for gap, token in token_texts(text, cut)) == text


def shaded(values: list[float], zero: float = 0.0, limit: float = 1.0) -> list[str]:
    tokens = tuple(("", chr(97 + i)) for i in range(len(values)))
    text = "".join(token for _, token in tokens)
    return [
        piece.css for piece in TextProjection(text, tokens, torch.tensor(values), "v", "h", zero, limit).view().pieces
    ]


def test_shades_are_white_at_zero_and_go_no_further_than_the_limit() -> None:
    white, half, full, beyond = shaded([0.0, 0.5, 1.0, 100.0])
    assert white == "background:rgb(255,255,255)" and full == beyond != half != white


def test_the_two_sides_of_zero_have_two_colours() -> None:
    def channels(css: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", css)]

    (red, _, blue), (other_red, _, other_blue) = map(channels, shaded([1.0, -1.0]))
    assert red > blue and other_blue > other_red


def test_a_text_whose_projections_are_all_alike_has_no_shade() -> None:
    assert set(shaded([2.0, 2.0], zero=2.0, limit=0.0)) == {"background:rgb(255,255,255)"}


def test_extremes_are_the_highest_first_and_the_lowest_first() -> None:
    tokens = (("", "a"), (" ", "b"), ("", "c"))
    found = TextProjection("a bc", tokens, torch.tensor([1.0, 3.0, -2.0]), "v", "h", 0.0, 1.0)
    assert found.extremes(2) == ([("b", 3.0), ("a", 1.0)], [("c", -2.0), ("a", 1.0)])
    assert "Highest: b +3" in printed(found) and "Lowest: c -2" in printed(found)


@pytest.mark.tl
@pytest.mark.parametrize("kind", [pytest.param("hooked", marks=pytest.mark.hooked), "bridge"])
def test_every_token_gets_the_projection_of_its_own_activation(
    kind: str, tiny_hooked: Callable[[str, str], Any], tiny_llama: Path
) -> None:
    model, text = tiny_hooked("llama", kind), "The wind is strong, and <b> there is rain."
    direction = SteeringVector("calm", 1, torch.randn(32, generator=torch.Generator().manual_seed(1)), "llama")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=["blocks.1.hook_resid_post"])
    expected = cache["blocks.1.hook_resid_post"][0] @ (direction.vector / direction.vector.norm())
    found = project_text(model, text, direction)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    assert "".join(gap + token for gap, token in found.tokens) == text
    assert found.zero == pytest.approx(float(expected[1:].median()), abs=1e-3)
    page = Page(found._repr_html_())
    assert text in page.text and sum(tag == "tr" for tag, _ in page.elements) == len(expected) + 1
    assert text in printed(found) and "projection on calm at blocks.1.hook_resid_post" in printed(found)


@pytest.mark.tl
def test_a_rendered_chat_is_projected_as_it_is(tiny_hooked: Callable[[str, str], Any], tiny_llama: Path) -> None:
    model = tiny_hooked("llama", "bridge")
    pair = QAPair("q1", "explicit", "frq", "individual", "Where do you live?", "By the sea.")
    (prepared,) = prepare_inputs(AutoTokenizer.from_pretrained(tiny_llama), "You are Mara.", [pair])
    direction = SteeringVector("calm", 0, torch.ones(32), "llama")
    found = project_text(model, prepared, direction, zero=0.25)
    assert found.text == prepared.prompt_text and len(found.values) == len(prepared.input_ids) and found.zero == 0.25


@pytest.mark.tl
def test_a_text_without_tokens_or_offsets_is_refused(tiny_hooked: Callable[[str, str], Any]) -> None:
    model, direction = tiny_hooked("llama", "bridge"), SteeringVector("calm", 0, torch.ones(32), "llama")
    with pytest.raises(InputError, match="no tokens"):
        project_text(model, "", direction)
    with pytest.raises(InputError, match="offsets"):
        project_text(model, "hello", direction, tokenizer=object())
