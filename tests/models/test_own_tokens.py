"""A loaded model has the checkpoint's own tokens, where TransformerLens gives a tokenizer a BOS or an end of text."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import BOTH_KINDS
from span_oracle import ROLES, TEMPLATES
from templates import Behaviour
from tiny import CHATML
from tokenizer_kinds import fast_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_persona import extract_caa_vectors, generate, load_model
from tl_persona.backends import open_backend
from tl_persona.generation import _ids
from tl_persona.models.checkpoints import load_tokenizer
from tl_persona.prompts.prepare import prepare_messages

TEXT = "The sea is loud."
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "By the sea."}]
PAIRS = [
    {"positive": f"I live by the sea, number {i}.", "negative": f"you live in town, number {i}."} for i in range(4)
]
ROLE_TOKENS = ("bos_token", "eos_token", "unk_token", "cls_token")

Change = Callable[[dict[str, Any], dict[str, Any]], None]


def plain_files(settings: dict[str, Any], raw: dict[str, Any]) -> None:
    """ChatML, an end, no BOS: as the family's folder is."""


def without_padding(settings: dict[str, Any], raw: dict[str, Any]) -> None:
    settings.pop("pad_token")


def bos_that_is_not_added(settings: dict[str, Any], raw: dict[str, Any]) -> None:
    settings |= {"bos_token": "<|im_start|>"}


def bos_that_is_added(settings: dict[str, Any], raw: dict[str, Any]) -> None:
    settings |= {"bos_token": "<|im_start|>", "chat_template": "{{ bos_token }}" + settings["chat_template"]}
    start = {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}
    assert {"id": 2, "content": "<|im_start|>"}.items() <= raw["added_tokens"][2].items()
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": start},
    }


def template_that_writes_a_bos_there_is_not(settings: dict[str, Any], raw: dict[str, Any]) -> None:
    settings["chat_template"] = "{{ bos_token }}" + settings["chat_template"]


EVERY_TOKENIZER = pytest.mark.parametrize(
    "change",
    [
        plain_files,
        without_padding,
        bos_that_is_not_added,
        bos_that_is_added,
        template_that_writes_a_bos_there_is_not,
    ],
    ids=lambda change: change.__name__,
)


def changed(folder: Path, to: Path, change: Change) -> Path:
    """A copy of a tiny model's folder with another tokenizer."""
    shutil.copytree(folder, to)
    settings, raw = (json.loads((to / name).read_text()) for name in ("tokenizer_config.json", "tokenizer.json"))
    settings.setdefault("chat_template", CHATML)
    change(settings, raw)
    (to / "chat_template.jinja").unlink(missing_ok=True)
    (to / "tokenizer_config.json").write_text(json.dumps(settings))
    (to / "tokenizer.json").write_text(json.dumps(raw))
    return to


@pytest.mark.tl
@EVERY_TOKENIZER
@BOTH_KINDS
def test_what_is_loaded_has_the_tokens_that_transformers_gives(
    kind: Any, change: Change, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_llama, tmp_path / "m", change)
    own, mine = AutoTokenizer.from_pretrained(folder), load_model(folder, kind=kind).tokenizer
    assert mine(TEXT)["input_ids"] == own(TEXT)["input_ids"]
    assert [getattr(mine, role) for role in ROLE_TOKENS] == [getattr(own, role) for role in ROLE_TOKENS]
    wanted = own.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert prepare_messages(mine, [("s", CHAT)])[0].input_ids.tolist() == wanted
    assert prepare_messages(load_tokenizer(folder), [("s", CHAT)])[0].input_ids.tolist() == wanted


@pytest.mark.tl
@EVERY_TOKENIZER
@BOTH_KINDS
def test_to_tokens_adds_a_bos_and_leaves_it_out_as_it_is_asked_to(
    kind: Any, change: Change, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_llama, tmp_path / "m", change)
    own, model = AutoTokenizer.from_pretrained(folder), load_model(folder, kind=kind)
    bare = own(TEXT, add_special_tokens=False)["input_ids"]
    bos = [] if own.bos_token_id is None else [own.bos_token_id]
    assert len(bare) > 3
    assert model.to_tokens(TEXT, prepend_bos=False).tolist() == [bare]
    assert model.to_tokens(TEXT, prepend_bos=True).tolist() == [bos + bare]
    longer = f"{TEXT} It is far."
    both = model.to_tokens([longer, TEXT], prepend_bos=False).tolist()
    assert both[0] == own(longer, add_special_tokens=False)["input_ids"]
    assert both[1][: len(bare)] == bare  # the rest is padding
    assert model.cfg.d_vocab == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size


@pytest.mark.tl
@EVERY_TOKENIZER
@BOTH_KINDS
@pytest.mark.parametrize("position", ["mean", "last"])
def test_vectors_of_raw_text_are_those_of_the_transformers_model(
    position: str, kind: Any, change: Change, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_llama, tmp_path / "m", change)
    own, hf = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def mean_of(side: str) -> torch.Tensor:
        found = []
        for pair in PAIRS:
            with torch.no_grad():
                states = hf(torch.tensor([own(pair[side])["input_ids"]]), output_hidden_states=True).hidden_states[1][0]
            found.append(states[1:].mean(dim=0) if position == "mean" else states[-1])
        return torch.stack(found).mean(dim=0)

    wanted = mean_of("positive") - mean_of("negative")
    for model, tokenizer in ((load_model(folder, kind=kind), None), (hf, own)):
        vector = extract_caa_vectors(model, tokenizer, PAIRS, [0], position, False)[0].vector
        torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.tl
@EVERY_TOKENIZER
@BOTH_KINDS
def test_generation_begins_with_the_tokens_that_transformers_gives(
    kind: Any, change: Change, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_llama, tmp_path / "m", change)
    own, model = AutoTokenizer.from_pretrained(folder), load_model(folder, kind=kind)
    question = own.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    wanted = [torch.tensor(own(TEXT)["input_ids"]), torch.tensor(question)]
    with_ids, as_given = (
        [said.ids.tolist() for said in generate(model, prompts, max_new_tokens=3)]
        for prompts in (wanted, [TEXT, CHAT[:1]])
    )
    assert as_given == with_ids
    assert [_ids(0, prompt, model.tokenizer, {}).tolist() for prompt in (TEXT, CHAT[:1])] == [
        each.tolist() for each in wanted
    ]


@pytest.mark.tl
@EVERY_TOKENIZER
def test_a_callers_tokenizer_stays_as_it_was(change: Change, tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path / "m", change)
    own, hf = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    roles, ids = [getattr(own, role) for role in (*ROLE_TOKENS, "pad_token")], own(TEXT)["input_ids"]
    backend = open_backend(hf, tokenizer=own)
    assert backend.tokenizer is own
    assert [getattr(own, role) for role in (*ROLE_TOKENS, "pad_token")] == roles and own(TEXT)["input_ids"] == ids


# --- a folder whose tokenizer names no BOS and no end ---------------------------------------------------------------


def nameless(folder: Path, to: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A copy of a folder without the tokenizer's settings, and with these ids."""
    shutil.copytree(folder, to)
    (to / "tokenizer_config.json").unlink()
    (to / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | {"bos_token_id": None, "eos_token_id": None} | config))
    (to / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (to / "generation_config.json").write_text(json.dumps(generation))
    return to


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({"bos_token_id": 2, "eos_token_id": 1}, None, ("<|im_start|>", "<|im_end|>")),
        ({"eos_token_id": [1, 0]}, None, (None, "<|im_end|>")),
        ({}, {"bos_token_id": 2, "eos_token_id": [1, 2]}, ("<|im_start|>", "<|im_end|>")),
        ({"eos_token_id": 1}, {"bos_token_id": 2, "eos_token_id": 0}, ("<|im_start|>", "<|im_end|>")),
        ({"bos_token_id": 10**6}, None, (None, None)),
        ({}, None, (None, None)),
    ],
)
def test_a_tokenizer_that_names_neither_bos_nor_end_takes_them_from_the_models_settings(
    config: dict[str, Any], generation: Any, wanted: Any, tiny_llama: Path, tmp_path: Path, caplog: Any
) -> None:
    folder = nameless(tiny_llama, tmp_path / tmp_path.name, config, generation)  # what is said once is said by name
    bare = AutoTokenizer.from_pretrained(folder)
    if (bare.bos_token, bare.eos_token) != (None, None):
        pytest.skip("this release of transformers names them by itself; `make test-newest` has one that does not")
    with caplog.at_level(logging.WARNING, logger="tl_persona"):
        found = [load_tokenizer(folder) for _ in range(2)]
    for tokenizer in found:
        assert (tokenizer.bos_token, tokenizer.eos_token) == wanted
        assert tokenizer(TEXT)["input_ids"] == bare(TEXT)["input_ids"]
    said = [each.getMessage() for each in caplog.records if "neither BOS nor EOS" in each.getMessage()]
    assert [line.partition("configuration's: ")[2] for line in said] == (
        [f"BOS {wanted[0]!r}, EOS {wanted[1]!r}"] if any(wanted) else []
    )


@pytest.mark.tl
@BOTH_KINDS
def test_a_model_without_a_tokenizers_settings_has_the_ends_of_its_configuration(
    kind: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = nameless(tiny_llama, tmp_path / "bare", {"bos_token_id": 2, "eos_token_id": 1}, None)
    model = load_model(folder, kind=kind)
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (2, 1)
    bare = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert model.to_tokens(TEXT, prepend_bos=False).tolist() == [bare]
    assert model.to_tokens(TEXT, prepend_bos=True).tolist() == [[2, *bare]]


def test_a_tokenizer_that_names_an_end_and_no_bos_has_none(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"bos_token_id": 2}))
    assert load_tokenizer(folder).bos_token is None


def test_a_folder_with_a_tokenizers_files_only_is_read_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    settings = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        settings.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(tiny_llama)(TEXT)["input_ids"]


# --- chat templates and the BOS ------------------------------------------------------------------------------------


def with_bos() -> Any:
    """A tokenizer that adds a BOS by itself."""
    tokenizer = fast_tokenizer("byte_level")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("behaviour", TEMPLATES, ids=lambda behaviour: behaviour.name)
def test_a_chat_has_the_bos_that_its_template_writes_and_no_second_one(behaviour: Behaviour) -> None:
    tokenizer, kwargs = with_bos(), dict(behaviour.kwargs)
    tokenizer.chat_template = behaviour.template
    roles = [role for role in ROLES if role != "system" or not behaviour.folds]
    chat = [{"role": role, "content": f"{role.title()} says A."} for role in roles]
    ids = prepare_messages(tokenizer, [("s", chat)], template_kwargs=kwargs)[0].input_ids.tolist()
    assert tokenizer("A")["input_ids"][0] == tokenizer.bos_token_id
    assert ids == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **kwargs)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, **kwargs)
    assert ids.count(tokenizer.bos_token_id) == rendered.count("<s>") <= 1
    begun = _ids(0, chat[:-1], tokenizer, kwargs).tolist()
    assert begun == tokenizer.apply_chat_template(
        chat[:-1], tokenize=True, add_generation_prompt=True, return_dict=False, **kwargs
    )


@pytest.mark.tl
def test_a_raw_prompt_that_brings_its_bos_gets_no_second_one(tiny_gemma: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    assert _ids(0, "<bos>Hello", tokenizer, {}).tolist() == _ids(0, "Hello", tokenizer, {}).tolist()
    assert _ids(0, "Hello", tokenizer, {}).tolist().count(tokenizer.bos_token_id) == 1
