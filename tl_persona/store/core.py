"""Persona vectors on disk: `<root>/<model>/<mask_strategy>/<variant>/<persona_id>.safetensors`.

Decides where a vector lies, what may be saved beside what, and whether a stored vector is still the right one. A folder
that another library wrote in this layout is read as it is, and such a library reads ours.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import msgspec
from torch import Tensor

from tl_persona.data.personas import BASELINE_PERSONA_ID
from tl_persona.display import Card, Shown
from tl_persona.errors import CorruptFileError, InputError, NotStoredError, StoreError, StoreMismatchError
from tl_persona.files import is_folder, make_folder, refuse_outside, write_atomically
from tl_persona.provenance import Provenance, conflicts
from tl_persona.store import manifest
from tl_persona.store.file import decode, encode
from tl_persona.store.folder import (
    is_identified,
    model_folder_name,
    refuse_anothers_file,
    refuse_misfit,
    safe_component,
    some_recorded,
)
from tl_persona.store.header import SUFFIX, ArtifactHeader, read_bytes, read_header
from tl_persona.tensors import LayerVectors

DEFAULT_ROOT = Path("artifacts/activations")
DEFAULT_VARIANTS = ("templated", "biography")
DEFAULT_MASK_STRATEGY = "answer_mean"

_Store = TypeVar("_Store", bound="StoredVectors")


class StoredStatus(msgspec.Struct, frozen=True):
    """Whether a stored vector is what would be computed now.

    Attributes:
        state: `absent`, `same`, `differs` (computed from something else) or `corrupt` (not to be trusted).
        reasons: For `differs` and `corrupt`, one line each on what was found.
    """

    state: Literal["absent", "same", "differs", "corrupt"]
    reasons: tuple[str, ...] = ()


class StoredVectors(Shown):
    """What is saved, loaded, listed and compared of one model, by variant and persona; see `PersonaVectorStore`.

    Args:
        model_name: Names the folder; `/` becomes `__`.
        root_dir: Where the store lies.
        mask_strategy: What methods use that are not given another.
        variants: What methods look into that are not given others.

    Raises:
        InputError: The model name or the strategy cannot name a folder.
    """

    def __init__(
        self,
        model_name: str,
        root_dir: str | Path | None = None,
        mask_strategy: object | None = DEFAULT_MASK_STRATEGY,
        variants: Sequence[str] = DEFAULT_VARIANTS,
    ) -> None:
        self.model_name = model_name
        self.root_dir = DEFAULT_ROOT if root_dir is None else Path(root_dir).expanduser()
        self.mask_strategy = mask_strategy
        self.variants = tuple(variants)
        self._strategy_folder(mask_strategy)
        self._used_folders: set[Path] = set()
        self._identified: dict[Path, Provenance] = {}

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def save(
        self,
        prompt_variant: str,
        persona_id: str,
        persona_name: str,
        vectors: Tensor,
        sample_ids: Sequence[str],
        mask_strategy: object | None = None,
        *,
        provenance: Provenance | None = None,
    ) -> Path:
        """Save one persona's `vectors` (layer, d_model) as float32, over what is stored of it, and return the folder.

        Raises:
            InputError: A name that is no file name, a tensor of another kind, provenance that does not fit them.
            NonFiniteError: A layer holds NaN, infinity or a number beyond float32.
            StoreMismatchError: The folder holds vectors of another shape, hooks or weights, or a file whose name
                differs in nothing but case.
            StoreError: The file system refused; a newer tl_persona wrote the folder; a link leads out of the store.
        """
        path = self.path_of(prompt_variant, persona_id, mask_strategy)
        if isinstance(sample_ids, str):
            raise InputError(f"persona {persona_id!r}: sample_ids is the text {sample_ids!r}, not a list of ids")
        data = encode(
            vectors,
            persona_id=persona_id,
            persona_name=persona_name,
            sample_ids=[str(sample_id) for sample_id in sample_ids],
            provenance=provenance,
        )
        layers, width = vectors.shape
        with self._writing(path.parent):
            refuse_outside(path, self.root_dir)
            refuse_misfit(path.parent, (layers, width), provenance)
            refuse_anothers_file(path, persona_id)
            write_atomically(path, data)
            manifest.record(path.parent, path)
        if provenance is not None and is_identified(provenance):
            self._identified[path.parent] = provenance
        return path.parent

    def load(self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None) -> LayerVectors:
        """The stored vectors, in float32, their checksum verified.

        Raises:
            NotStoredError: Nothing is stored under these names.
            CorruptFileError: The file is truncated or altered.
            StoreError: The file cannot be read, or a newer tl_persona wrote it.
        """
        path = self._file(prompt_variant, persona_id, mask_strategy)
        return decode(read_bytes(path), path, persona_id)[1]

    def list_personas(
        self,
        variants: Sequence[str] | None = None,
        mask_strategy: object | None = None,
        warn_missing: bool = True,
        *,
        include_baseline: bool = False,
    ) -> list[str]:
        """Sorted ids of the personas stored in every one of `variants`.

        Args:
            variants: None takes the store's own.
            mask_strategy: None takes the store's own.
            warn_missing: Whether to warn of personas that some of the variants lack.
            include_baseline: Whether `baseline_assistant` counts as a persona.
        """
        found = [set(index.personas) for index in self._indexes(variants, mask_strategy)]
        if not found or not all(found):
            return []
        shared = set.intersection(*found)
        skipped = len(set.union(*found) - shared)
        if warn_missing and skipped:
            warnings.warn(f"{skipped} persona(s) are not stored in every requested variant: left out", stacklevel=2)
        return sorted(shared if include_baseline else shared - {BASELINE_PERSONA_ID})

    def persona_names(
        self,
        persona_ids: Sequence[str],
        variants: Sequence[str] | None = None,
        mask_strategy: object | None = None,
    ) -> dict[str, str]:
        """Display names in the order of `persona_ids`, from the first variant that has one; unknown ids are left out.

        Empty, as `list_personas` is, when one of the variants holds nothing.
        """
        indexes = self._indexes(variants, mask_strategy)
        if not all(index.personas for index in indexes):
            return {}
        names = {}
        for persona_id in persona_ids:
            known = (index.personas[persona_id]["name"] for index in indexes if persona_id in index.personas)
            name = next(filter(None, known), None)
            if name is not None:
                names[persona_id] = name
        return names

    def persona_sample_ids(
        self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None
    ) -> list[str] | None:
        """Ids of the samples that were averaged; None where nothing is stored or its ids are not known."""
        try:
            header = self._header(prompt_variant, persona_id, mask_strategy)
        except NotStoredError:
            return None
        return manifest.name_and_sample_ids(header)[1]

    def list_layers(
        self,
        variants: Sequence[str],
        persona_ids: Sequence[str] | None = None,
        mask_strategy: object | None = None,
    ) -> list[int]:
        """Layer indices that all of `variants` have; empty when one holds nothing or lacks one of `persona_ids`."""
        indexes = self._indexes(variants, mask_strategy)
        wanted = set(persona_ids or ())
        if not indexes or not all(wanted <= index.personas.keys() for index in indexes):
            return []
        return list(range(min(0 if index.shape is None else index.shape[0] for index in indexes)))

    def available_variants(
        self, variants: Sequence[str] | None = None, mask_strategy: object | None = None
    ) -> list[str]:
        """Those of `variants`, by default of the store's own, in which something is stored."""
        candidates = self.variants if variants is None else tuple(variants)
        return [name for name in candidates if self._indexes([name], mask_strategy)[0].personas]

    def path_of(self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None) -> Path:
        """Where a persona's file lies, whether or not it is there.

        Raises:
            InputError: One of the names cannot be a file's or folder's.
        """
        return self._folder(prompt_variant, mask_strategy) / f"{safe_component(persona_id, 'persona id')}{SUFFIX}"

    def status(
        self,
        prompt_variant: str,
        persona_id: str,
        provenance: Provenance,
        mask_strategy: object | None = None,
    ) -> StoredStatus:
        """Whether the stored vector is what `provenance` would give again. Reads and verifies the whole file.

        Raises:
            StoreError: The file cannot be read, or a newer tl_persona wrote it: neither is a reason to replace it.
        """
        path = self._file(prompt_variant, persona_id, mask_strategy)
        self._used_folders.add(path.parent)
        try:
            recorded = decode(read_bytes(path), path, persona_id)[0].provenance
        except NotStoredError:
            return StoredStatus("absent")
        except CorruptFileError as error:
            return StoredStatus("corrupt", (str(error),))
        if recorded is None:
            return StoredStatus("differs", ("the file does not record what it was computed from",))
        differences = recorded.differences(provenance)
        return StoredStatus("differs", tuple(differences)) if differences else StoredStatus("same")

    def refuse_conflict(
        self, prompt_variant: str, persona_id: str, provenance: Provenance, mask_strategy: object | None = None
    ) -> None:
        """Check that what is stored in a folder is of the weights and under the interventions of `provenance`.

        Looks at the persona's own file and at others, up to one that says what it is of; what that says is remembered.
        Of its own file the weights alone count: under other interventions it is replaced, as with other prompts.

        Raises:
            StoreMismatchError: It is known to be of others; where that is not known, nothing is raised.
            StoreError: The folder or a file cannot be read.
        """
        path = self._file(prompt_variant, persona_id, mask_strategy)
        own = _recorded(path)
        if own is not None:
            _refuse(path, conflicts(own, provenance, weights_only=True))
        folder = path.parent
        known = self._identified.get(folder)
        if known is not None and not conflicts(known, provenance):
            return
        for other, recorded in some_recorded(folder, but=path):
            _refuse(other, conflicts(recorded, provenance))
            if is_identified(recorded):
                self._identified[folder] = recorded

    def stored_digest(self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None) -> str | None:
        """The digest in the file's header, without reading its tensor; None where there is no trustworthy one."""
        try:
            return self._header(prompt_variant, persona_id, mask_strategy).digest
        except StoreError:
            return None

    def provenance(
        self, prompt_variant: str, persona_id: str, mask_strategy: object | None = None
    ) -> Provenance | None:
        """What a stored vector was computed from; None where it was saved without, or by another library.

        Raises:
            NotStoredError: Nothing is stored under these names.
            StoreError: The file's header cannot be read.
        """
        return self._header(prompt_variant, persona_id, mask_strategy).provenance

    def rebuild_manifest(self, prompt_variant: str, mask_strategy: object | None = None) -> list[str]:
        """Write one folder's `manifest.json` anew from the headers of its files, and return the ids found.

        Raises:
            NotStoredError: There is no such folder.
            StoreError: It cannot be read or written.
        """
        folder = self._folder(prompt_variant, mask_strategy)
        if not is_folder(folder):
            raise NotStoredError(f"nothing is stored in {folder}; extract it first")
        with self._writing(folder):
            return list(manifest.rewrite(folder, trust=False).personas)

    def flush(self) -> None:
        """Complete `manifest.json` in the folders this object has saved to, or has asked the `status` of.

        Raises:
            StoreError: A manifest cannot be written; the vectors themselves are safe.
        """
        for folder in sorted(self._used_folders):
            if not manifest.is_up_to_date(folder):
                with self._writing(folder):
                    manifest.rewrite(folder)
        self._used_folders.clear()

    def _card(self) -> Card:
        """What the store's own strategy and variants hold; a folder that cannot be read is said to be so."""
        facts = {"root": str(self.root_dir), "strategy": str(getattr(self.mask_strategy, "value", self.mask_strategy))}
        for variant in self.variants:
            try:
                ids = self.list_personas([variant], include_baseline=True)
                layers = self.list_layers([variant])
            except StoreError as error:
                facts[variant] = f"cannot be read: {error}"
                continue
            held = (
                f"{len(ids)} persona{'' if len(ids) == 1 else 's'}, {len(layers)} layers" if ids else "nothing stored"
            )
            facts[variant] = held
        return Card(f"persona vectors of {self.model_name}", facts)

    def _strategy_folder(self, mask_strategy: object | None) -> Path:
        chosen = self.mask_strategy if mask_strategy is None else mask_strategy
        name = DEFAULT_MASK_STRATEGY if chosen is None else str(getattr(chosen, "value", chosen))
        return self.root_dir / model_folder_name(self.model_name) / safe_component(name, "mask strategy")

    def _folder(self, prompt_variant: str, mask_strategy: object | None) -> Path:
        return self._strategy_folder(mask_strategy) / safe_component(prompt_variant, "prompt variant")

    def _indexes(self, variants: Sequence[str] | None, mask_strategy: object | None) -> list[manifest.Index]:
        folders = [self._folder(name, mask_strategy) for name in (self.variants if variants is None else variants)]
        for folder in folders:
            refuse_outside(folder, self.root_dir)
        return [manifest.read_index(folder) for folder in folders]

    def _file(self, prompt_variant: str, persona_id: str, mask_strategy: object | None) -> Path:
        """As `path_of`, for reading: what a link shows from elsewhere is no part of the store."""
        path = self.path_of(prompt_variant, persona_id, mask_strategy)
        refuse_outside(path, self.root_dir)
        return path

    def _header(self, prompt_variant: str, persona_id: str, mask_strategy: object | None) -> ArtifactHeader:
        return read_header(self._file(prompt_variant, persona_id, mask_strategy), persona_id)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        refuse_outside(folder, self.root_dir)
        make_folder(folder)
        self._used_folders.add(folder)
        with manifest.locked(folder):
            yield


def _recorded(path: Path) -> Provenance | None:
    try:
        return read_header(path).provenance
    except (NotStoredError, CorruptFileError):
        return None


def _refuse(path: Path, found: list[str]) -> None:
    if found:
        raise StoreMismatchError(
            f"{path} is of another model or under other interventions ({'; '.join(found)}), and a folder holds vectors "
            "of one model and one set of interventions: pass another model_name, another activations_dir "
            "(--activations-dir), or force=True (--force), which replaces this persona and leaves the others"
        )
