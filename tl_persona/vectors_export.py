"""The ways of a set of steering vectors to other programs and back, as the methods that `SteeringVectorSet` inherits.

How a format or a foreign object is made is the work of `export`; here vectors are chosen, and made of what came back.
"""

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tl_persona.errors import CorruptFileError, InputError, NotStoredError
from tl_persona.export import control_vectors, peers
from tl_persona.export.cards import set_card
from tl_persona.export.repositories import CARD, pull_files, push_files
from tl_persona.files import SET_FILE
from tl_persona.layer_table import row_of
from tl_persona.steering_vector import SteeringVector, built
from tl_persona.vector_files import SUFFIX

_Set = TypeVar("_Set", bound="SetExports")
_SET_FILES = re.compile(rf"{re.escape(SET_FILE)}|layer_[0-9]{{1,9}}{re.escape(SUFFIX)}")


class SetExports(ABC):
    """What leaves with a set of steering vectors, and what comes in as one.

    Other programs mean by layer i what is meant here by default: the output of block i. They add a vector times a
    coefficient, as `steer` does, so vectors go over as they are; what acts at another hook is refused.
    """

    behavior: str

    @abstractmethod
    def __init__(self, behavior: str, vectors: Iterable[SteeringVector] | None = None) -> None: ...

    @abstractmethod
    def __iter__(self) -> Iterator[SteeringVector]: ...

    @abstractmethod
    def save(self, folder: str | Path) -> None: ...

    @classmethod
    @abstractmethod
    def load(cls: type[_Set], folder: str | Path) -> _Set: ...

    def chosen(self, layers: Iterable[int] | None = None) -> list[SteeringVector]:
        """The vectors of some layers, in that order, or all by ascending layer.

        Raises:
            InputError: The set has no such layer.
        """
        vectors = {vector.layer_index: vector for vector in self}
        wanted = list(vectors if layers is None else layers)
        missing = [layer for layer in wanted if layer not in vectors]
        if missing:
            raise InputError(f"no vector for layers {missing} of {self.behavior!r}; there are {list(vectors)}")
        return [vectors[layer] for layer in wanted]

    def export_gguf(
        self, path: str | Path, *, layers: Iterable[int] | None = None, model_hint: str | None = None
    ) -> Path:
        """Write a GGUF control vector for llama.cpp (`--control-vector`), in float32.

        llama.cpp adds all directions of a file at once: choose the layer that steers best, or a few.

        Args:
            path: The file; `.gguf` is appended where it is missing.
            layers: Which layers go into it; None is all.
            model_hint: What the file says its model is, such as `llama`; None is the model's name.

        Returns:
            The file written.

        Raises:
            InputError: A vector acts on the output of block 0, which llama.cpp leaves alone, or on no output of a block
                at all; there is none, or not the layer asked for.
            NonFiniteError: A vector does not fit float32.
            MissingDependencyError: The package gguf is not installed.
            StoreError: The file system refused.
        """
        return control_vectors.write_control_vector(Path(path), self.chosen(layers), model_hint)

    @classmethod
    def import_gguf(
        cls: type[_Set], path: str | Path, *, behavior: str | None = None, model_name: str | None = None
    ) -> _Set:
        """Read a GGUF control vector, ours with all that was known of it, or one of repeng or llama.cpp.

        Args:
            path: The file.
            behavior: What the vectors stand for; None is what the file says, or its stem.
            model_name: The model they are of, as `load_model` names it; None is what the file says.

        Raises:
            NotStoredError: There is no such file.
            CorruptFileError: It is no control vector that llama.cpp would take, or was altered since it was written.
            StoreError: It cannot be read, or a later version of this package wrote it.
        """
        source = Path(path)
        vectors = [
            built(fields, source) for fields in control_vectors.read_control_vector(source, behavior, model_name)
        ]
        try:
            return cls(vectors[0].behavior, vectors)
        except InputError as error:
            raise CorruptFileError(f"{source}: {error}") from error

    def export_rotalabs(self, folder: str | Path, *, layers: Iterable[int] | None = None) -> Path:
        """Write a folder that rotalabs-steer loads as its own set; `load` reads it back.

        That format keeps its tensors in torch's pickle, which is why nothing else here writes it.

        Returns:
            The folder.

        Raises:
            InputError: There is no vector, or one is no output of a block, or has metadata without a JSON form; the
                folder holds a set that `save` wrote.
            StoreError: The file system refused.
        """
        return peers.write_rotalabs(Path(folder), self.chosen(layers))

    def to_steering_vectors(self, *, layers: Iterable[int] | None = None) -> Any:
        """The set as a `steering_vectors.SteeringVector`, whose `apply(model, multiplier=...)` steers with it.

        Raises:
            InputError: There is no vector, or one is no output of a block.
            MissingDependencyError: steering-vectors is not installed.
        """
        return peers.as_steering_vectors(self.chosen(layers))

    @classmethod
    def from_steering_vectors(cls: type[_Set], vector: Any, behavior: str, model_name: str) -> _Set:
        """A set of the vectors of a `steering_vectors.SteeringVector`, which says neither behaviour nor model.

        Raises:
            InputError: It is something else, acts on another part of a block, or counts blocks from the end.
        """
        return cls._of(peers.from_steering_vectors(vector), behavior, model_name, "steering-vectors")

    def to_repeng(self, *, layers: Iterable[int] | None = None, model_type: str | None = None) -> Any:
        """The set as a `repeng.ControlVector`, for `ControlModel.set_control(vector, coeff)`, in float32.

        Args:
            layers: Which layers go into it; None is all.
            model_type: What repeng compares when it adds vectors, such as `llama`; None is the model's name.

        Raises:
            InputError: There is no vector, or one is no output of a block.
            MissingDependencyError: repeng is not installed.
        """
        return peers.as_repeng(self.chosen(layers), model_type)

    @classmethod
    def from_repeng(cls: type[_Set], control: Any, behavior: str, model_name: str | None = None) -> _Set:
        """A set of the vectors of a `repeng.ControlVector`.

        Args:
            control: The vector; its directions are at norm 1 where repeng's PCA made them.
            behavior: What it stands for.
            model_name: The model, as `load_model` names it; None is the control vector's `model_type`.

        Raises:
            InputError: It is something else, or counts blocks from the end.
        """
        model_type, vectors = peers.from_repeng(control)
        return cls._of(vectors, behavior, model_type if model_name is None else model_name, "repeng")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put the set, as `save` writes it, into a model repository, with a generated card, in one commit.

        The repository is made where there is none.

        Args:
            repo_id: Such as `me/refusal-vectors`.
            license: A licence's identifier for the card, such as `cc-by-4.0`; None states none.
            private: Whether a repository that is made is private; None leaves it to the account's setting.
            revision: The branch; None is the main one.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Returns:
            The address of the commit.

        Raises:
            InputError: The set is empty, some metadata has no JSON form, or the repository's id is none.
            NotStoredError: There is no such branch.
            StoreError: The hub refused, or cannot be reached.
        """
        vectors = self.chosen()
        if not vectors:
            raise InputError(f"the set for {self.behavior!r} is empty: there is nothing to push")
        card = set_card(
            repo_id,
            self.behavior,
            vectors[0].model_name,
            [row_of(vector) for vector in vectors],
            [vector.extraction_method for vector in vectors],
            vectors[0].provenance,
            license,
        )
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files: dict[str, Path | bytes] = {
                path.name: path for path in Path(folder).iterdir() if _SET_FILES.fullmatch(path.name)
            }
            return push_files(
                repo_id,
                "model",
                {**files, CARD: card.encode()},
                message=f"Steering vectors for {self.behavior}",
                private=private,
                revision=revision,
                token=token,
            )

    @classmethod
    def from_hub(
        cls: type[_Set], repo_id: str, *, revision: str | None = None, token: str | bool | None = None
    ) -> _Set:
        """Read a set from a model repository to which `push_to_hub` put it.

        Nothing that comes from there is trusted: only safetensors files and the file that names them are fetched, and
        their checksums are compared, as `load` does.

        Args:
            repo_id: Such as `me/refusal-vectors`.
            revision: Branch, tag or commit; None is the main branch.
            token: None takes the one that `hf auth login` stored, or `HF_TOKEN`.

        Raises:
            NotStoredError: There is no such repository or revision, or it holds no set.
            CorruptFileError: A file is damaged, or not the one that was saved with this set.
            InputError: The repository's id is none.
            StoreError: The hub refused, or cannot be reached; a later version of this package wrote the set.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = pull_files(
                repo_id,
                "model",
                lambda path: _SET_FILES.fullmatch(path) is not None,
                Path(folder),
                revision=revision,
                token=token,
            )
            if SET_FILE not in names:
                raise NotStoredError(f"model {repo_id!r} holds no set of steering vectors: it has no {SET_FILE}")
            return cls.load(folder)

    @classmethod
    def _of(cls: type[_Set], vectors: Mapping[int, Tensor], behavior: str, model_name: str, method: str) -> _Set:
        return cls(behavior, [SteeringVector(behavior, i, vector, model_name, method) for i, vector in vectors.items()])
