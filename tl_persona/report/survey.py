"""Finds what a report can be about: persona vectors by model, strategy and variant, and sets of steering vectors.

Nothing is drawn here, and vectors are loaded when they are asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_persona.data.personas import BASELINE_PERSONA_ID
from tl_persona.errors import NotStoredError, StoreError
from tl_persona.files import reason
from tl_persona.provenance import Provenance
from tl_persona.store.header import SUFFIX
from tl_persona.store.store import PersonaVectorStore
from tl_persona.vectors.vector_set import SteeringVectorSet

SET_FILE = "metadata.json"
_SET_DEPTH = 3


@dataclass(frozen=True)
class Collection:
    """The persona vectors of one model, strategy and variant.

    Attributes:
        store: Where they are, with the strategy as its own.
        model: The model's name.
        strategy: The mask strategy.
        variant: The prompt variant.
        persona_ids: Sorted, the plain assistant last if it is there.
        names: In the same order; the id where there is no name.
    """

    store: PersonaVectorStore
    model: str
    strategy: str
    variant: str
    persona_ids: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def counted(self) -> Bool[Tensor, "persona"]:
        """Who makes up the mean persona: all but the plain assistant, or everyone where that leaves nobody."""
        found = torch.tensor([persona_id != BASELINE_PERSONA_ID for persona_id in self.persona_ids])
        return found if found.any() else ~found

    def vectors(self) -> Float[Tensor, "persona layer d_model"]:
        """All vectors, in the order of `persona_ids`.

        Raises:
            StoreError: A file cannot be read or trusted.
        """
        return self.store.load_matrix(self.variant, self.persona_ids)

    def provenance(self, persona_id: str) -> Provenance | None:
        """What a persona's vectors were computed from, if that was recorded."""
        return self.store.provenance(self.variant, persona_id)

    def n_samples(self, persona_id: str) -> int | None:
        """Of how many samples a persona's vectors are the mean, if that was recorded."""
        ids = self.store.persona_sample_ids(self.variant, persona_id)
        return None if ids is None else len(ids)


@dataclass(frozen=True)
class Survey:
    """What there is under one path.

    Attributes:
        collections: By model, strategy and variant.
        sets: By folder, relative to the path, the steering vectors.
    """

    collections: tuple[Collection, ...]
    sets: tuple[tuple[str, SteeringVectorSet], ...]


def survey(path: str | Path) -> Survey:
    """What there is under `path`: the root of a store, the folder of one model in it, or a set of steering vectors.

    Raises:
        NotStoredError: There is nothing.
        StoreError: Something there cannot be read or trusted.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise NotStoredError(f"{path} is no folder: name the root of a store, or the folder of a steering vector set")
    try:
        set_folders = list(_set_folders(path))
        models = _model_folders(path, set_folders)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {reason(error)}") from error
    found = Survey(
        tuple(collection for model in models for collection in _collections(model)),
        tuple((folder.relative_to(path).as_posix(), SteeringVectorSet.load(folder)) for folder in set_folders),
    )
    if not found.collections and not found.sets:
        raise NotStoredError(f"{path} holds neither persona vectors nor a set of steering vectors")
    return found


def _set_folders(path: Path) -> Iterator[Path]:
    for depth in range(_SET_DEPTH + 1):
        for file in sorted(path.glob("*/" * depth + SET_FILE)):
            if file.is_file() and any(file.parent.glob("layer_*")):
                yield file.parent


def _model_folders(path: Path, set_folders: list[Path]) -> list[Path]:
    """The folders `<root>/<model>`, `path` being the root or one of them."""
    if any(path.glob(f"*/*/*/*{SUFFIX}")):
        return [folder for folder in sorted(path.iterdir()) if any(folder.glob(f"*/*/*{SUFFIX}"))]
    variants = {file.parent for file in path.glob(f"*/*/*{SUFFIX}")} - set(set_folders)
    return [path] if variants else []


def _collections(model: Path) -> Iterator[Collection]:
    for strategy in sorted(folder.name for folder in model.iterdir() if folder.is_dir()):
        variants = sorted(folder.name for folder in (model / strategy).iterdir() if _is_plain(folder))
        root = model.resolve().parent
        store = PersonaVectorStore(model.resolve().name, root, mask_strategy=strategy, variants=variants)
        for variant in variants:
            ids = store.list_personas([variant], warn_missing=False, include_baseline=True)
            ids.sort(key=lambda persona_id: persona_id == BASELINE_PERSONA_ID)
            if not ids:
                continue
            names = store.persona_names(ids, [variant])
            recorded = store.provenance(variant, ids[0])
            yield Collection(
                store,
                model.resolve().name.replace("__", "/") if recorded is None else recorded.model_name,
                strategy,
                variant,
                tuple(ids),
                tuple(names.get(persona_id) or persona_id for persona_id in ids),
            )


def _is_plain(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")
