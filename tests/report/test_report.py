"""What the report computes, finds and writes; how it looks and behaves is tested in a browser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_persona.cli.main import main
from tl_persona.errors import InputError, MissingDependencyError, NotStoredError
from tl_persona.report import (
    cosines,
    layer_profile_figure,
    norms_figure,
    persona_map_figure,
    principal_map,
    similarity_figure,
    without_mean,
    write_report,
)
from tl_persona.report.attributes import colouring, colourings
from tl_persona.report.data import MAX_PAIRS, NONE, STEPS, collection_data, packed, pairs_of, thinned
from tl_persona.report.style import LONGEST, distinct, labels_of
from tl_persona.report.survey import survey
from tl_persona.store import PersonaVectorStore
from tl_persona.vectors import SteeringVector, SteeringVectorSet


def random_vectors(personas: int = 6, layers: int = 3, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(personas, layers, width, generator=torch.Generator().manual_seed(seed)) + 1.0


def filled(root: Path, personas: int = 3, variants: tuple[str, ...] = ("templated",), model: str = "org/model") -> Path:
    with PersonaVectorStore(model, root) as store:
        for number in range(personas):
            for variant in variants:
                vectors = random_vectors(1, seed=number)[0]
                store.save(variant, f"p{number}", f"Person {number}", vectors, ["q1", "q2"])
    return root


def measured_set(aucs: list[float | None], behavior: str = "calm") -> SteeringVectorSet:
    vectors = SteeringVectorSet(behavior)
    for layer, auc in enumerate(aucs):
        known = {} if auc is None else {"auc": auc, "auc_low": auc - 0.1, "auc_high": auc + 0.01, "split_half": 0.5}
        vectors.add(SteeringVector(behavior, layer, torch.ones(4), "org/model", metadata={"statistics": known}))
    return vectors


class TestGeometry:
    def test_cosines_are_those_of_numpy(self) -> None:
        rows = random_vectors()[:, 0]
        exact = rows.double().numpy()
        expected = exact @ exact.T / np.outer(np.linalg.norm(exact, axis=1), np.linalg.norm(exact, axis=1))
        np.testing.assert_allclose(cosines(rows).numpy(), expected, atol=1e-12)

    @given(st.integers(2, 6), st.integers(0, 1000))
    def test_what_is_left_without_the_mean_sums_to_nothing(self, personas: int, seed: int) -> None:
        rest = without_mean(random_vectors(personas, seed=seed))
        torch.testing.assert_close(rest.sum(dim=0), torch.zeros_like(rest[0]), atol=1e-9, rtol=0)

    def test_personas_that_are_all_alike_leave_nothing_and_no_direction(self) -> None:
        alike = (random_vectors(1) * 1e4).repeat(7, 1, 1)
        rest = without_mean(alike)
        assert not rest.any() and cosines(rest[:, 0]).isnan().all()

    def test_who_does_not_count_moves_no_mean(self) -> None:
        vectors = random_vectors(4)
        counted = torch.tensor([True, True, False, True])
        expected = vectors.double() - vectors[[0, 1, 3]].double().mean(dim=0)
        torch.testing.assert_close(without_mean(vectors, counted), expected)
        with pytest.raises(InputError, match="no persona counts"):
            without_mean(vectors, torch.zeros(4, dtype=torch.bool))

    def test_a_map_is_the_principal_components_of_numpy(self) -> None:
        vectors = random_vectors(7)
        placed, shares = principal_map(vectors)
        for layer in range(vectors.shape[1]):
            rows = vectors[:, layer].double().numpy()
            sides, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
            np.testing.assert_allclose(np.abs(placed[layer].numpy()), np.abs(sides[:, :2] * values[:2]), atol=1e-9)
            np.testing.assert_allclose(shares[layer].numpy(), values[:2] ** 2 / (values**2).sum(), atol=1e-9)

    def test_a_map_does_not_flip_from_one_layer_to_the_next(self) -> None:
        one = random_vectors(6, layers=1)
        placed, _ = principal_map(torch.cat([one, -one, one * 2], dim=1))
        assert ((placed[1:] * placed[:-1]).sum(dim=1) >= 0).all()

    def test_personas_on_one_line_have_no_second_component(self) -> None:
        line = torch.arange(5.0)[:, None, None] * torch.ones(1, 1, 4)
        placed, shares = principal_map(line)
        assert shares.tolist() == [[pytest.approx(1.0), 0.0]] and not placed[:, :, 1].any()

    def test_two_personas_make_no_map(self) -> None:
        with pytest.raises(InputError, match="at least 3"):
            principal_map(random_vectors(2))


class TestFigures:
    def test_the_heatmap_has_a_frame_for_each_layer_and_its_slider_names_them(self) -> None:
        vectors = random_vectors()
        figure = similarity_figure(vectors, list("abcdef"), layers=[4, 9, 14])
        assert [frame.name for frame in figure.frames] == ["4", "9", "14"]
        assert [step.label for step in figure.layout.sliders[0].steps] == ["4", "9", "14"]
        for index, frame in enumerate(figure.frames):
            np.testing.assert_allclose(frame.data[0].z, cosines(vectors[:, index]).numpy(), atol=1e-4)
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)

    def test_the_heatmap_without_the_mean_is_that_of_the_rest(self) -> None:
        vectors = random_vectors()
        figure = similarity_figure(vectors, list("abcdef"), remove_mean=True)
        np.testing.assert_allclose(figure.data[0].z, cosines(without_mean(vectors)[:, 0]).numpy(), atol=1e-4)
        with pytest.raises(InputError, match="its own mean"):
            similarity_figure(vectors[:1], ["a"], remove_mean=True)

    def test_the_middle_of_the_heatmap_s_colours_is_the_lightest(self) -> None:
        scale = similarity_figure(random_vectors(2), ["a", "b"]).data[0].colorscale

        def brightness(colour: str) -> float:
            numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
            return 0.2126 * numbers[0] + 0.7152 * numbers[1] + 0.0722 * numbers[2]

        light = [brightness(colour) for _, colour in scale]
        middle = light.index(max(light))
        assert scale[middle][0] == pytest.approx(0.5, abs=0.06)
        assert light[: middle + 1] == sorted(light[: middle + 1]) and light[middle:] == sorted(light[middle:])[::-1]

    def test_a_few_personas_have_a_line_each_and_many_a_band(self) -> None:
        few = norms_figure(random_vectors(3), ["a", "b", "c"])
        assert [trace.name for trace in few.data if trace.showlegend] == ["a", "b", "c"]
        vectors = random_vectors(50)
        many = {trace.name: trace.y for trace in norms_figure(vectors, [str(i) for i in range(50)]).data}
        norms = np.linalg.norm(vectors.double().numpy(), axis=2)
        np.testing.assert_allclose(many["median persona"], np.median(norms, axis=0), rtol=1e-4)
        np.testing.assert_allclose(many["10 % to 90 % of personas"], np.quantile(norms, 0.9, axis=0), rtol=1e-4)

    def test_a_map_draws_each_group_where_its_members_are(self) -> None:
        vectors = random_vectors(5)
        figure = persona_map_figure(
            vectors, list("abcde"), layer=-1, attribute=["x", "y", "x", None, "y"], title="home"
        )
        placed = principal_map(vectors[:, -1:])[0][0]
        assert [trace.name for trace in figure.data] == ["x", "y", "not known"]
        assert list(figure.data[1].x) == placed[[1, 4], 0].tolist() and list(figure.data[1].text) == ["b", "e"]

    def test_a_map_of_numbers_has_a_scale(self) -> None:
        figure = persona_map_figure(random_vectors(5), list("abcde"), layer=0, attribute=[1, 2, 3, 4, 5], title="age")
        assert list(figure.data[0].marker.color) == [1, 2, 3, 4, 5] and figure.data[0].marker.showscale

    def test_a_profile_draws_statistics_with_intervals_and_marks_the_chosen_layer(self) -> None:
        figure = layer_profile_figure(measured_set([0.6, 0.9, 0.8]))
        lines = {trace.name: trace for trace in figure.data}
        assert list(lines["held-out AUC"].y) == [0.6, 0.9, 0.8]
        assert list(lines["95 % interval of the AUC"].y) == pytest.approx([0.5, 0.8, 0.7, 0.81, 0.91, 0.61])
        assert list(lines["split-half cosine"].y) == [0.5] * 3 and "held-out d'" not in lines
        assert {shape.x0 for shape in figure.layout.shapes} == {1}

    def test_a_profile_without_statistics_shows_norms_and_the_choice_by_them(self) -> None:
        figure = layer_profile_figure(measured_set([None, None]))
        assert [trace.name for trace in figure.data] == ["norm of the vector"]
        assert "norm" in figure.layout.annotations[0].hovertext

    def test_a_profile_with_statistics_at_some_layers_chooses_nothing(self) -> None:
        assert not layer_profile_figure(measured_set([0.6, None])).layout.shapes

    def test_an_empty_set_has_no_profile(self) -> None:
        with pytest.raises(InputError, match="empty"):
            layer_profile_figure(SteeringVectorSet("calm"))

    @pytest.mark.parametrize("draw", [similarity_figure, norms_figure])
    def test_counts_that_differ_are_refused(self, draw: Any) -> None:
        with pytest.raises(InputError, match="2 names for vectors of 6"):
            draw(random_vectors(), ["a", "b"])
        with pytest.raises(InputError, match="1 layer numbers for vectors of 3"):
            draw(random_vectors(), list("abcdef"), layers=[1])

    def test_a_map_refuses_a_layer_or_attributes_that_do_not_fit(self) -> None:
        with pytest.raises(InputError, match="no layer 3"):
            persona_map_figure(random_vectors(), list("abcdef"), layer=3)
        with pytest.raises(InputError, match="1 attributes for 6"):
            persona_map_figure(random_vectors(), list("abcdef"), layer=0, attribute=["x"])

    def test_without_plotly_the_message_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
        with pytest.raises(MissingDependencyError, match=r"tl-persona\[plots\]"):
            similarity_figure(random_vectors(2), ["a", "b"])

    def test_the_functions_load_no_plotly_before_they_draw(self) -> None:
        code = "import sys, tl_persona.report; print('plotly' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


class TestNames:
    @given(st.lists(st.text(max_size=40), max_size=8))
    def test_labels_are_all_different_and_short(self, names: list[str]) -> None:
        labels = distinct(names)
        assert len(set(labels)) == len(names) and all(len(label) <= LONGEST + len(" (99)") for label in labels)

    @given(st.lists(st.text(max_size=20), unique=True, max_size=5))
    def test_names_that_are_different_and_short_stay_as_they_are(self, names: list[str]) -> None:
        assert distinct(names) == names

    @given(st.text(max_size=30))
    def test_no_label_has_markup(self, name: str) -> None:
        assert not re.search(r"[<>]", labels_of([name])[0])


class TestColourings:
    @given(st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), max_size=30))
    def test_every_persona_is_in_exactly_one_group(self, values: list[Any]) -> None:
        members = [index for group in colouring("x", values).groups for index in group.members]
        assert sorted(members) == list(range(len(values)))

    @given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1, max_size=60))
    def test_groups_look_different_and_are_few(self, values: list[str]) -> None:
        groups = colouring("x", values).groups
        assert len(groups) <= 12 and len({(group.colour, group.shape) for group in groups}) == len(groups)

    def test_the_rarest_values_are_drawn_as_one(self) -> None:
        values = [*"aabbccddeeffgghhiijjkk", "rare", "rarer"]
        assert colouring("x", values).groups[-1].label == "other (2 values)"
        assert colouring("x", values).groups[-1].members == (22, 23)

    def test_attributes_in_which_all_are_alike_colour_nothing(self) -> None:
        known = {
            "a": {"home": "sea", "kind": 1, "first_name": "A"},
            "b": {"home": "hill", "kind": 1, "first_name": "B"},
        }
        assert [shown.title for shown in colourings(["a", "b", "c"], known)] == ["one colour", "home"]

    def test_personas_nobody_knows_have_one_colour(self) -> None:
        (only,) = colourings(["a", "b"], {})
        assert [group.members for group in only.groups] == [(0, 1)]


class TestThinning:
    @given(st.integers(1, 2000), st.integers(1, 120), st.integers(1, 40))
    def test_what_is_kept_fits_the_page_and_keeps_both_ends(self, personas: int, layers: int, matrices: int) -> None:
        kept = thinned(personas, layers, matrices)
        assert pairs_of(len(kept.personas)) * len(kept.layers) * matrices <= max(MAX_PAIRS, 6 * matrices)
        for chosen, count in ((kept.personas, personas), (kept.layers, layers)):
            assert list(chosen) == sorted(set(chosen)) and chosen[0] == 0
            assert chosen[-1] == count - 1 or len(chosen) == 1

    @given(st.integers(1, 12), st.integers(0, 99))
    def test_packed_cosines_come_back_to_a_fraction_of_what_is_shown(self, personas: int, seed: int) -> None:
        import base64

        similarity = cosines(random_vectors(personas, seed=seed)[:, 0])
        steps = np.frombuffer(base64.b64decode(packed(similarity)), dtype="<i2")
        expected = [similarity[i, j].item() for i in range(personas) for j in range(i + 1, personas)]
        np.testing.assert_allclose(steps / STEPS, expected, atol=1 / STEPS)

    def test_what_has_no_cosine_is_marked(self) -> None:
        import base64

        similarity = cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        assert np.frombuffer(base64.b64decode(packed(similarity)), dtype="<i2").tolist() == [NONE]

    def test_five_hundred_personas_are_thinned_and_the_page_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = random_vectors(500, layers=30)
        monkeypatch.setattr("tl_persona.report.survey.Collection.vectors", lambda _: vectors)
        monkeypatch.setattr("tl_persona.report.survey.Collection.provenance", lambda *_: None)
        from tl_persona.report.survey import Collection

        ids = tuple(f"p{i:03}" for i in range(500))
        many = Collection(PersonaVectorStore("m"), "m", "answer_mean", "templated", ids, ids)
        data = collection_data(many, {}, matrices=16)
        assert len(json.dumps(data)) < 2e6  # of sixteen such
        assert re.search(r"heatmap has \d+ of 500 personas and 6 of 30 layers", data["left_out"])
        assert len(data["map"]["places"][0][0]) == 500  # nobody is missing from the map


class Scripts(HTMLParser):
    """The addresses and script elements of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


class TestPage:
    def test_the_command_writes_a_page_and_says_where(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = filled(tmp_path / "store", variants=("templated", "biography"))
        assert main(["report", str(root), "-o", str(tmp_path / "out" / "page.html")]) == 0
        assert f"report written to {tmp_path / 'out' / 'page.html'}" in capsys.readouterr().out
        page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
        for word in ("org__model", "templated", "biography", "answer_mean", "Person 2", "not recorded"):
            assert word.replace("__", "/") in page

    def test_a_page_names_no_address_and_holds_plotly_once(self, tmp_path: Path) -> None:
        page = write_report(filled(tmp_path / "store"), tmp_path / "page.html").read_text(encoding="utf-8")
        found = Scripts(page)
        assert set(found.addresses) <= {"#content", "data:,"} and found.scripts == 3
        assert page.count("* plotly.js v") == 1 and len(page) < 6e6

    def test_the_same_store_makes_the_same_page(self, tmp_path: Path) -> None:
        root = filled(tmp_path / "store")
        one, two = (write_report(root, tmp_path / name) for name in ("one.html", "two.html"))
        assert one.read_bytes() == two.read_bytes()

    def test_the_policy_allows_the_pages_own_scripts_by_their_digests_alone(self, tmp_path: Path) -> None:
        import base64
        import hashlib

        page = write_report(filled(tmp_path / "store"), tmp_path / "page.html").read_text(encoding="utf-8")
        scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
        assert policy is not None and "default-src 'none'" in policy[1]
        assert re.findall(r"sha256-([^']*)", policy[1]) == digests and "unsafe-inline'; img" in policy[1]

    def test_a_root_a_model_and_a_set_can_be_named(self, tmp_path: Path) -> None:
        root = filled(tmp_path / "store")
        filled(root, model="other")
        measured_set([0.6, 0.9]).save(root / "steering" / "calm")
        everything = survey(root)
        assert [each.model for each in everything.collections] == ["org/model", "other"]
        assert [(folder, vectors.behavior) for folder, vectors in everything.sets] == [("steering/calm", "calm")]
        assert [each.model for each in survey(root / "other").collections] == ["other"]
        alone = survey(root / "steering" / "calm")
        assert alone.collections == () and [folder for folder, _ in alone.sets] == ["."]

    def test_the_plain_assistant_is_last_and_no_part_of_the_mean(self, tmp_path: Path) -> None:
        root = filled(tmp_path / "store")
        PersonaVectorStore("org/model", root).save(
            "templated", "baseline_assistant", "Assistant", random_vectors(1)[0], ["q1"]
        )
        (only,) = survey(root).collections
        assert only.persona_ids == ("p0", "p1", "p2", "baseline_assistant")
        assert only.counted.tolist() == [True, True, True, False]

    def test_nothing_to_report_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(NotStoredError, match="no folder"):
            survey(tmp_path / "nowhere")
        with pytest.raises(NotStoredError, match="neither persona vectors nor"):
            survey(tmp_path)

    def test_a_folder_as_the_page_is_refused(self, tmp_path: Path) -> None:
        assert main(["report", str(filled(tmp_path / "store")), "-o", str(tmp_path)]) == 2

    def test_personas_of_a_file_colour_the_map(self, tmp_path: Path) -> None:
        people = tmp_path / "people.jsonl"
        lines = [
            {"id": f"p{i}", "persona": {"mood": mood}, "templated_view": "x", "biography_view": "y"}
            for i, mood in enumerate(["calm", "cross", "calm"])
        ]
        people.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        arguments = ["report", str(filled(tmp_path / "store")), "-o", str(tmp_path / "page.html")]
        assert main([*arguments, "--personas", str(people)]) == 0
        assert '"mood"' in (tmp_path / "page.html").read_text(encoding="utf-8")
        assert main([*arguments, "--personas", str(people), "--dataset", "repo"]) == 2

    def test_data_cannot_end_the_element_it_stands_in(self, tmp_path: Path) -> None:
        hostile = "</script><script>alert(1)</script><!--"
        root = tmp_path / "store"
        with PersonaVectorStore("org/model", root) as store:
            for number in range(3):
                store.save("templated", f"p{number}", hostile, random_vectors(1, seed=number)[0], [hostile])
        measured_set([0.7], behavior=hostile).save(root / "s" / "hostile")
        page = write_report(root, tmp_path / "page.html", attributes={"p0": {hostile: hostile}, "p1": {hostile: "x"}})
        text = page.read_text(encoding="utf-8")
        assert Scripts(text).scripts == 3 and hostile not in text and "<script>alert" not in text
