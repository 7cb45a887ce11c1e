"""How many blocks a model has, how wide it is, and which of its layers are worth trying first for steering.

`get_model_config` takes a name or a model. A name is looked up in a table of well-known models, and otherwise in the
model's own config.json; it is never matched by resemblance. What is recommended is a place to start, with its reason:
the layer that is best on your pairs is found by measuring (`SteeringVectorSet.get_best`), which is not done here.
Nothing here loads weights, and importing this module loads neither torch nor transformers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tl_persona.errors import ModelError


class RecommendedLayers(list[int]):
    """Layer indices, a list like any other, that also says where the choice comes from.

    Attributes:
        reason: One sentence for people.

    Example:
        >>> layers = RecommendedLayers([3, 4], "the middle third of 9 blocks")
        >>> layers == [3, 4], layers.reason
        (True, 'the middle third of 9 blocks')
    """

    def __init__(self, layers: Iterable[int], reason: str = "") -> None:
        super().__init__(layers)
        self.reason = reason


@dataclass(frozen=True)
class ModelConfig:
    """The size of a model, and its recommended layers.

    Attributes:
        name: Hub id, or the name a folder or model gives itself.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        family: The `model_type` of transformers; for a TransformerLens model the architecture's name.
        source: Where the sizes were read: the `table` in this module, a `config` file, or the `model` itself.
    """

    name: str
    n_layers: int
    d_model: int
    family: str
    source: Literal["table", "config", "model"]

    @property
    def num_layers(self) -> int:
        """`n_layers`, by the name that transformers and rotalabs-steer use."""
        return self.n_layers

    @property
    def hidden_size(self) -> int:
        """`d_model`, by the name that transformers and rotalabs-steer use."""
        return self.d_model

    def get_recommended_layers(self, behavior: str | None = None) -> RecommendedLayers:
        """The layers to extract from first; index i is the output of block i.

        Without a published measurement for this model and behaviour these are the blocks of the middle third. Steering
        by contrastive activation addition was found strongest around there: Rimsky et al. (2024, arXiv:2312.06681)
        tried every layer of Llama 2 Chat 7B and steer at layer 13 of 32. An unknown behaviour is no error, but
        the reason says so.

        Args:
            behavior: Such as `refusal`; None asks for the model in general.

        Example:
            >>> layers = get_model_config("Qwen/Qwen3-8B").get_recommended_layers("refusal")
            >>> layers[0], layers[-1]
            (12, 23)
            >>> print(layers.reason)
            the middle third of 36 blocks, where steering is usually strongest: no measurement for 'refusal' on ...
        """
        measured = _MEASUREMENTS.get((self.name, behavior))
        if measured is not None and self._has_the_shape_of_its_name():
            return RecommendedLayers(_around(measured.layer, self.n_layers), measured.reason)
        reason = f"the middle third of {self.n_layers} blocks, where steering is usually strongest"
        if behavior is not None:
            reason += f": no measurement for {behavior!r} on {self.name} is known here"
        return RecommendedLayers(_middle_third(self.n_layers), reason)

    def _has_the_shape_of_its_name(self) -> bool:
        known = MODEL_CONFIGS.get(self.name)
        return known is not None and (known.n_layers, known.d_model) == (self.n_layers, self.d_model)


def get_model_config(model: Any) -> ModelConfig:
    """The configuration of a model, by name or read off the model.

    A folder is read even where its name is in the table. Names are compared without regard to case, with or without
    the organisation, and must otherwise be a model's full name: what is not in the table is asked of its config.json,
    in the local hub cache or on the hub. A GGUF file has none: load it and pass the model.

    Args:
        model: A hub id or its last part, a local folder, a TransformerLens model (with `cfg`) or a transformers model
            (with `config`).

    Raises:
        ModelError: The name is not in the table and has no readable config.json, or the object tells no sizes.

    Example:
        >>> config = get_model_config("smollm2-135m-instruct")
        >>> config.name, config.n_layers, config.d_model, config.source
        ('HuggingFaceTB/SmolLM2-135M-Instruct', 30, 576, 'table')
    """
    if not isinstance(model, str | Path):
        return _from_model(model)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _from_config_file(str(folder))
    return _BY_SPELLING.get(str(model).lower()) or _from_config_file(str(model))


def _from_config_file(location: str) -> ModelConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # Said outright, because transformers would otherwise stop and ask about code that comes with the model.
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:  # the last: sizes that do not go together
        nearest = get_close_matches(location.lower(), _BY_SPELLING, n=2)
        hint = f" (nearest: {', '.join(_BY_SPELLING[name].name for name in nearest)})" if nearest else ""
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{location!r} is not in the table of known models{hint}, and transformers cannot read its config.json: "
            f"{cause.rstrip('.')}; load the model and pass it instead of its name"
        ) from error
    return _from_hf_config(config, _own_name(location), "config")


def _from_model(model: Any) -> ModelConfig:
    cfg = getattr(model, "cfg", None)
    if cfg is not None:  # first, because a TransformerBridge may also show the config of the model it wraps
        sizes = (getattr(cfg, "n_layers", None), getattr(cfg, "d_model", None))
        # The first is HookedTransformer's word, the second TransformerBridge's.
        architectures = (getattr(cfg, word, None) for word in ("original_architecture", "architecture"))
        family = next((known for known in architectures if known), type(model).__name__)
        name = getattr(cfg, "model_name", None) or type(model).__name__
        return _checked(_own_name(name), sizes, family, "model")
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"a {type(model).__name__} has neither `cfg` nor `config`: pass a TransformerLens or transformers model, "
            "or a model's name"
        )
    name = getattr(config, "_name_or_path", None) or type(model).__name__
    return _from_hf_config(config, _own_name(name), "model")


def _from_hf_config(config: Any, name: str, source: Literal["config", "model"]) -> ModelConfig:
    # A model that also sees or hears keeps the sizes of its language model one level down.
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = (getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None))
    return _checked(name, sizes, getattr(config, "model_type", None) or type(config).__name__, source)


def _checked(name: str, sizes: tuple[Any, Any], family: str, source: Literal["config", "model"]) -> ModelConfig:
    n_layers, d_model = sizes
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(
            f"the configuration of {name!r} gives {n_layers!r} blocks of width {d_model!r}: "
            "only models of equal blocks on one residual stream are supported"
        )
    return ModelConfig(name, n_layers, d_model, family, source)


def _own_name(location: str) -> str:
    """A folder goes by its last part, a hub id by itself; so no folder passes for a model of the hub."""
    path = Path(location).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else location


def _middle_third(n_layers: int) -> range:
    start = n_layers // 3
    return range(start, max(start + 1, 2 * n_layers // 3))


def _around(layer: int, n_layers: int) -> range:
    """Two blocks on either side: neighbouring layers differ little, and the measurement used other prompts."""
    return range(max(0, layer - 2), min(n_layers, layer + 3))


@dataclass(frozen=True)
class _Measurement:
    """The block whose output was found best by somebody who tried them all."""

    layer: int
    reason: str


def _refusal_direction(block_input: int) -> _Measurement:
    """From the `direction_metadata.json` files that Arditi et al. published with their code.

    They count the inputs of blocks (`resid_pre`), and the input of block i is the output of block i - 1.
    """
    return _Measurement(
        block_input - 1,
        f"two blocks either side of block {block_input - 1}, whose output (the input of block {block_input}) Arditi et "
        "al. (2024, arXiv:2406.11717, published runs) selected for this model's refusal direction, from harmful and "
        "harmless prompts",
    )


_MEASUREMENTS: Mapping[tuple[str, str | None], _Measurement] = {
    ("meta-llama/Llama-2-7b-chat-hf", "refusal"): _refusal_direction(14),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "refusal"): _refusal_direction(12),
    ("google/gemma-2b-it", "refusal"): _refusal_direction(10),
    ("google/gemma-2-2b-it", "refusal"): _refusal_direction(15),
}
"""By hub id and behaviour. An entry needs a source that can be checked; everything else is the middle third."""

# Family, hub id without size and variant, variants, and for each size the blocks and the width of its config.json.
_Row = tuple[str, str, tuple[str, ...], dict[str, tuple[int, int]]]
_TABLE: tuple[_Row, ...] = (
    ("gpt2", "openai-community/gpt2", ("",), {"": (12, 768), "-medium": (24, 1024), "-large": (36, 1280),
        "-xl": (48, 1600)}),
    ("gpt_neox", "EleutherAI/pythia-", ("",), {"14m": (6, 128), "31m": (6, 256)}),
    ("gpt_neox", "EleutherAI/pythia-", ("", "-deduped"), {"70m": (6, 512), "160m": (12, 768), "410m": (24, 1024),
        "1b": (16, 2048), "1.4b": (24, 2048), "2.8b": (32, 2560), "6.9b": (32, 4096), "12b": (36, 5120)}),
    ("llama", "meta-llama/Llama-2-", ("-hf", "-chat-hf"), {"7b": (32, 4096), "13b": (40, 5120), "70b": (80, 8192)}),
    ("llama", "meta-llama/Meta-Llama-3-", ("", "-Instruct"), {"8B": (32, 4096), "70B": (80, 8192)}),
    ("llama", "meta-llama/Llama-3.1-", ("", "-Instruct"), {"8B": (32, 4096), "70B": (80, 8192), "405B": (126, 16384)}),
    ("llama", "meta-llama/Llama-3.2-", ("", "-Instruct"), {"1B": (16, 2048), "3B": (28, 3072)}),
    ("llama", "meta-llama/Llama-3.3-", ("-Instruct",), {"70B": (80, 8192)}),
    ("llama", "HuggingFaceTB/SmolLM2-", ("", "-Instruct"), {"135M": (30, 576), "360M": (32, 960), "1.7B": (24, 2048)}),
    ("llama", "deepseek-ai/DeepSeek-R1-Distill-Llama-", ("",), {"8B": (32, 4096), "70B": (80, 8192)}),
    ("qwen2", "deepseek-ai/DeepSeek-R1-Distill-Qwen-", ("",), {"1.5B": (28, 1536), "7B": (28, 3584), "14B": (48, 5120),
        "32B": (64, 5120)}),
    ("qwen2", "Qwen/Qwen2.5-", ("", "-Instruct"), {"0.5B": (24, 896), "1.5B": (28, 1536), "3B": (36, 2048),
        "7B": (28, 3584), "14B": (48, 5120), "32B": (64, 5120), "72B": (80, 8192)}),
    ("qwen3", "Qwen/Qwen3-", ("", "-Base"), {"0.6B": (28, 1024), "1.7B": (28, 2048), "4B": (36, 2560),
        "8B": (36, 4096), "14B": (40, 5120)}),
    ("qwen3", "Qwen/Qwen3-", ("-Instruct-2507", "-Thinking-2507"), {"4B": (36, 2560)}),
    ("qwen3", "Qwen/Qwen3-", ("",), {"32B": (64, 5120)}),
    ("qwen3_moe", "Qwen/Qwen3-", ("", "-Instruct-2507", "-Thinking-2507"), {"30B-A3B": (48, 2048),
        "235B-A22B": (94, 4096)}),
    ("gemma", "google/gemma-", ("", "-it"), {"2b": (18, 2048), "7b": (28, 3072)}),
    ("gemma2", "google/gemma-2-", ("", "-it"), {"2b": (26, 2304), "9b": (42, 3584), "27b": (46, 4608)}),
    ("gemma3_text", "google/gemma-3-", ("", "-it"), {"270m": (18, 640)}),
    ("gemma3_text", "google/gemma-3-", ("-pt", "-it"), {"1b": (26, 1152)}),
    ("gemma3", "google/gemma-3-", ("-pt", "-it"), {"4b": (34, 2560), "12b": (48, 3840), "27b": (62, 5376)}),
    ("mistral", "mistralai/Mistral-", ("-v0.1", "-Instruct-v0.1", "-Instruct-v0.2", "-v0.3", "-Instruct-v0.3"),
        {"7B": (32, 4096)}),
    ("mixtral", "mistralai/Mixtral-", ("-v0.1", "-Instruct-v0.1"), {"8x7B": (32, 4096), "8x22B": (56, 6144)}),
    ("phi3", "microsoft/Phi-", ("-instruct",), {"3-mini-4k": (32, 3072), "3-mini-128k": (32, 3072),
        "3.5-mini": (32, 3072), "4-mini": (32, 3072)}),
    ("phi3", "microsoft/phi-4", ("",), {"": (40, 5120)}),
    ("olmo2", "allenai/OLMo-2-", ("", "-Instruct"), {"0425-1B": (16, 2048), "1124-7B": (32, 4096),
        "1124-13B": (40, 5120), "0325-32B": (64, 5120)}),
    ("gpt_oss", "openai/gpt-oss-", ("",), {"20b": (24, 2880), "120b": (36, 2880)}),
)  # fmt: skip


def _expand(table: Iterable[_Row]) -> Iterator[ModelConfig]:
    for family, stem, variants, shapes in table:
        for size, (n_layers, d_model) in shapes.items():
            for variant in variants:
                yield ModelConfig(f"{stem}{size}{variant}", n_layers, d_model, family, "table")


MODEL_CONFIGS: Mapping[str, ModelConfig] = MappingProxyType({config.name: config for config in _expand(_TABLE)})
"""The table, by hub id; read-only."""


def _spellings(hub_id: str) -> Iterator[str]:
    """How people write a hub id: its older names, and each of them without the organisation."""
    organisation, _, name = hub_id.lower().partition("/")
    names = {name, name.removesuffix("-hf"), name.removeprefix("meta-")}
    if name.startswith("llama-3.1"):  # published as Meta-Llama-3.1, and renamed
        names.add(f"meta-{name}")
    for each in names:
        yield each
        yield f"{organisation}/{each}"


_BY_SPELLING: Mapping[str, ModelConfig] = {
    **{spelling: config for config in MODEL_CONFIGS.values() for spelling in _spellings(config.name)},
    "smollm2": MODEL_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"],  # as `load_model` calls it
    "gpt2-small": MODEL_CONFIGS["openai-community/gpt2"],  # as TransformerLens calls it
}


_NAME_OF_A_LENGTH = re.compile("window|chunk|context|n_ctx|positions|position_embeddings|seq_len|floor_scale")


def lengths_named(settings: Any, named: bool = False) -> Iterator[int]:
    """Every number in a configuration whose name speaks of a length in tokens, at any depth.

    Sliding windows and chunks of attention, the length past which rotary positions are scaled, the context. One too
    many costs a proof, and one too few a wrong number.

    Args:
        settings: A configuration as a mapping, or a part of one.
        named: Whether the part's own name speaks of a length.

    Example:
        >>> list(lengths_named({"sliding_window": 512, "hidden_size": 64, "rope": {"original_max_positions": [8192]}}))
        [512, 8192]
    """
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from lengths_named(value, _NAME_OF_A_LENGTH.search(str(name)) is not None)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from lengths_named(value, named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool) and settings > 0:
        yield settings


_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")


def longest_text_named(settings: Mapping[str, Any]) -> int | None:
    """The longest text in tokens that a configuration says the model was made for; None where it has no such limit.

    Example:
        >>> longest_text_named({"text_config": {"max_position_embeddings": 8192}}), longest_text_named({"alibi": True})
        (8192, None)
    """
    if settings.get("alibi"):
        return None
    found = next((settings[name] for name in _LONGEST if isinstance(settings.get(name), int)), None)
    if found is None and isinstance(settings.get("text_config"), Mapping):
        return longest_text_named(settings["text_config"])
    return found


def chunks_named(settings: Any) -> Iterator[int]:
    """Those of `lengths_named` that are lengths of chunks, each of which ends what came before.

    Example:
        >>> list(chunks_named({"attention_chunk_size": 8192, "sliding_window": 512}))
        [8192]
    """
    if isinstance(settings, dict):
        for name, value in settings.items():
            if "chunk" in str(name):
                yield from lengths_named(value, named=True)
            else:
                yield from chunks_named(value)


_NAME_OF_A_CHOICE = re.compile("(index|sparse|attention|attn|keys?)_?.*top_?k|top_?k_?.*(keys?|blocks?|tokens?)$")


def chosen_keys_named(settings: Any) -> Iterator[int]:
    """Every number in a configuration whose name says how many keys attention chooses by what they are.

    Example:
        >>> list(chosen_keys_named({"index_topk": 2048, "num_experts_per_tok": 8, "topk_group": 4}))
        [2048]
    """
    if isinstance(settings, dict):
        for name, value in settings.items():
            if _NAME_OF_A_CHOICE.search(str(name)) and isinstance(value, int) and not isinstance(value, bool):
                yield value
            yield from chosen_keys_named(value)


_CHUNKS = 16
"""So many chunks of a text are told apart."""


def critical_lengths_named(settings: Any) -> set[int]:
    """The lengths at which a model of this configuration may start to treat a text differently.

    Sliding windows and chunks of attention, the length past which rotary positions are scaled, the number of keys that
    are chosen, and the context.

    Example:
        >>> sorted(critical_lengths_named({"sliding_window": 512, "index_topk": 64, "max_position_embeddings": 2048}))
        [64, 512, 2048]
    """
    chunks = {chunk * times for chunk in chunks_named(settings) for times in range(2, _CHUNKS + 1)}
    return {*lengths_named(settings), *chosen_keys_named(settings), *chunks}
