import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_persona.errors import HookError
from tl_persona.models.hooks import LayerSelection, layer_of, resid_post, resolve_hooks

N_LAYERS = 12
SITES = ("hook_in", "attn.hook_out", "attn.q.hook_out", "mlp.hook_out", "hook_out", "hook_resid_pre", "hook_resid_post")
"""As on a TransformerBridge: block outputs have two names, and inner modules have hooks of the same last name."""
NAMES = (
    "unembed.hook_in",
    *(f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in SITES),
    "ln_final.hook_normalized",
    "hook_embed",
)

layers = st.integers(-N_LAYERS, N_LAYERS - 1)


def resolve(selection: LayerSelection) -> tuple[str, ...]:
    return resolve_hooks(selection, NAMES, N_LAYERS)


def posts(indices: list[int]) -> tuple[str, ...]:
    return tuple(f"blocks.{index}.hook_resid_post" for index in indices)


def test_nothing_chosen_means_the_output_of_every_block_in_order() -> None:
    assert resolve(None) == posts(list(range(12)))


def test_nothing_chosen_does_not_skip_a_block_that_lacks_the_hook() -> None:
    with pytest.raises(HookError, match=r"no hook 'blocks\.1\.hook_resid_post'"):
        resolve_hooks(None, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], 2)


@given(st.lists(layers, min_size=1, unique_by=lambda layer: layer % N_LAYERS))
def test_ints_choose_what_they_index_in_a_list_of_blocks(chosen: list[int]) -> None:
    blocks = list(range(N_LAYERS))
    assert resolve(chosen) == posts([blocks[layer] for layer in chosen])
    assert resolve(tuple(chosen)) == resolve([str(layer) for layer in chosen]) == resolve(chosen)


ends = st.one_of(st.none(), st.integers(-N_LAYERS, N_LAYERS))


@given(ends, ends, st.sampled_from([None, 1, 2, 5, -1, -3]))
def test_ranges_choose_what_they_slice_from_a_list_of_blocks(
    start: int | None, stop: int | None, step: int | None
) -> None:
    expected = list(range(N_LAYERS))[start:stop:step]
    text = ":".join("" if end is None else str(end) for end in ((start, stop) if step is None else (start, stop, step)))
    for selection in (slice(start, stop, step), text, f" {text} ", [text]):
        if expected:
            assert resolve(selection) == posts(expected)
        else:
            with pytest.raises(HookError, match="is empty"):
                resolve(selection)


def test_range_objects_choose_their_numbers() -> None:
    assert resolve(range(2, 9, 3)) == posts([2, 5, 8])
    assert resolve(range(-2, 0)) == posts([10, 11])
    assert resolve([0, range(4, 6)]) == posts([0, 4, 5])


def test_a_number_of_another_library_is_a_number() -> None:
    import numpy as np

    assert resolve(np.int64(-1)) == posts([11])
    assert resolve([np.int64(3), 1]) == posts([3, 1])


def test_a_name_chooses_itself_and_lists_keep_their_order() -> None:
    assert resolve("blocks.3.mlp.hook_out") == ("blocks.3.mlp.hook_out",)
    mixed = ["hook_embed", 5, "blocks.3.hook_resid_pre", "1:3"]
    assert resolve(mixed) == ("hook_embed", *posts([5]), "blocks.3.hook_resid_pre", *posts([1, 2]))


def test_two_names_of_one_output_are_two_hooks() -> None:
    assert resolve(["blocks.3.hook_out", 3]) == ("blocks.3.hook_out", "blocks.3.hook_resid_post")


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("blocks.*.hook_resid_post", list(posts(list(range(12))))),
        ("blocks.*.hook_out", [f"blocks.{layer}.hook_out" for layer in range(12)]),
        ("blocks.3.**.hook_out", ["blocks.3.attn.hook_out", "blocks.3.attn.q.hook_out", "blocks.3.mlp.hook_out"]),
        ("**hook_embed", ["hook_embed"]),
        ("blocks.?.hook_in", [f"blocks.{layer}.hook_in" for layer in range(10)]),
        ("blocks.[1-3].hook_in", [f"blocks.{layer}.hook_in" for layer in (1, 2, 3)]),
        ("blocks.[!1-9].hook_in", ["blocks.0.hook_in"]),
        ("blocks.1[01].hook_resid_p*", [f"blocks.{i}.hook_resid_{s}" for i in (10, 11) for s in ("pre", "post")]),
        ("hook_*", ["hook_embed"]),
        ("*.hook_in", ["unembed.hook_in"]),
    ],
)
def test_a_glob_stays_between_dots(glob: str, expected: list[str]) -> None:
    assert list(resolve(glob)) == expected


def test_a_glob_takes_dots_for_dots() -> None:
    assert resolve_hooks("a.b*", ["aXb1", "a.b1"], 0) == ("a.b1",)


def test_globs_and_predicates_go_in_the_order_in_which_hooks_fire() -> None:
    assert resolve(lambda name: not name.startswith("blocks") or name.startswith("blocks.7.hook_resid")) == (
        "hook_embed",
        "blocks.7.hook_resid_pre",
        "blocks.7.hook_resid_post",
        "unembed.hook_in",
        "ln_final.hook_normalized",
    )


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.randoms())
def test_a_predicate_chooses_what_it_accepts_whatever_order_the_model_lists_blocks_in(
    wanted: set[str], draw: random.Random
) -> None:
    shuffled = list(range(N_LAYERS))
    draw.shuffle(shuffled)
    names = [f"blocks.{layer}.{site}" for layer in shuffled for site in SITES]
    chosen = resolve_hooks(lambda name: name in wanted or name == names[0], names, N_LAYERS)
    assert set(chosen) == (wanted & set(names)) | {names[0]}
    depths = [layer_of(name) for name in chosen]
    assert depths == sorted(depths)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (12, "no layer 12: the model has layers 0 to 11"),
        (-13, "no layer -13"),
        ("99", "no layer 99"),
        ([0, 40], "no layer 40"),
        (range(10, 14), "no layer 12"),
        ("3:13", "'3:13' leaves the model, which has layers 0 to 11"),
        (slice(-13, None), "leaves the model"),
        ("5:5", "'5:5' is empty"),
        ("1:5:0", "step 0"),
        (slice(1, 5, 0), "step 0"),
        ([], "no layer was chosen"),
        (range(0), "no layer was chosen"),
        ([3, "3"], "'blocks.3.hook_resid_post' is chosen twice"),
        ([-1, 11], "'blocks.11.hook_resid_post' is chosen twice"),
        (["blocks.*.hook_in", "blocks.4.hook_in"], "'blocks.4.hook_in' is chosen twice"),
        ("blocks.3.hook_resid_pots", "no hook 'blocks.3.hook_resid_pots'; nearest: blocks.3.hook_resid_post"),
        ("hook_embeds", "nearest: hook_embed"),
        ("", "no hook ''"),
        ("blocks.*.hook_reisd_post", r"fits none of the model's 87 hooks .*\*\* does.*nearest: .*hook_resid_post"),
        ("*hook_out", "does not cross a dot"),
        ("blocks.[9-1].hook_in", "is no glob"),
        (lambda name: False, "the predicate fits none of the model's 87 hooks"),
        (True, "True is not a layer"),
        ([False], "False is not a layer"),
    ],
)
def test_what_fits_nothing_is_refused_with_what_there_is(selection: LayerSelection, message: str) -> None:
    with pytest.raises(HookError, match=message):
        resolve(selection)


@pytest.mark.parametrize("text", ["{}", "-{}", "0:{}", "{}:", "::{}", "blocks.{}.hook_resid_post"])
def test_a_number_of_more_digits_than_python_counts_is_no_layer(text: str) -> None:
    with pytest.raises(HookError, match="no hook '"):
        resolve(text.format("9" * 5000))
    assert layer_of(text.format("9" * 5000)) is None


@pytest.mark.parametrize("thing", [[1], 1.5, None, {"layer": 1}])
def test_what_is_no_choice_at_all_is_refused(thing: object) -> None:
    unchecked = getattr(resolve_hooks, "__wrapped__", resolve_hooks)  # the tests' type checker would refuse it first
    with pytest.raises(HookError, match=f"{re.escape(repr(thing))} is not a layer"):
        unchecked([thing], NAMES, N_LAYERS)


@given(st.text(max_size=12))
def test_any_text_is_resolved_or_refused(text: str) -> None:
    try:
        chosen = resolve(text)
    except HookError:
        return
    assert set(chosen) <= set(NAMES)


@given(st.sampled_from(NAMES), st.randoms())
def test_a_name_with_stars_for_some_of_its_parts_fits_the_name(name: str, draw: random.Random) -> None:
    parts = name.split(".")
    glob = ".".join("*" if draw.random() < 0.5 else part for part in parts)
    chosen = resolve(glob)
    assert name in chosen
    assert all(other.count(".") == name.count(".") for other in chosen)


@given(st.integers(0, 10**6))
def test_the_layer_of_a_block_output_is_its_number(layer: int) -> None:
    assert layer_of(resid_post(layer)) == layer


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_scale", "encoder_blocks.3.hook_in", "blocks.x.hook_in"])
def test_a_hook_outside_the_blocks_has_no_layer(name: str) -> None:
    assert layer_of(name) is None


def test_near_names_come_from_the_model() -> None:
    with pytest.raises(HookError) as caught:
        resolve("blocks.4.hook_resid_mid")
    offered = re.split("nearest: ", str(caught.value))[1].split(", ")
    assert set(offered) <= set(NAMES)
    assert offered[0].startswith("blocks.4.hook_resid")
