"""A store that is saved to, killed, damaged, emptied and repaired in any order holds what a dict says it holds."""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stores import PROVENANCE, read_as_the_reference_does

from tl_persona.checking import check_saved
from tl_persona.errors import CorruptFileError, NotStoredError
from tl_persona.provenance import Provenance
from tl_persona.store import PersonaVectorStore, manifest

MODEL = "org/tiny"
VARIANTS = ("templated", "biography")
NESTED = b'{"personas": {}, "x": ' + b"[" * 900 + b"]" * 900 + b"}"
places = st.tuples(st.sampled_from(VARIANTS), st.sampled_from(["p1", "p2", "p3"]))
values = st.integers(1, 5)


class Killed(BaseException):
    """Stands for a kill: nothing that would clean up may run after it."""


class StoreMachine(RuleBasedStateMachine):
    """Two handles on one folder, beside what ought to be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda handle: None)
        self.ticks = 10**9
        self.handles = [PersonaVectorStore(MODEL, self.root) for _ in range(2)]
        self.saved: dict[tuple[str, str], int] = {}
        self.damaged: set[tuple[str, str]] = set()
        self.hidden: set[tuple[str, str]] = set()  # Damaged so that the header alone does not show it.

    @initialize(small=st.sampled_from([0, 64 * 1024]), share=st.sampled_from([0, 1, 8]))
    def choose_how_indexes_are_kept(self, small: int, share: int) -> None:
        self.patch.setattr(manifest, "SMALL", small)
        self.patch.setattr(manifest, "PENDING_SHARE", share)

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    def path_of(self, place: tuple[str, str]) -> Path:
        return self.handles[0].path_of(*place)

    def expected(self, place: tuple[str, str], value: int) -> None:
        self.saved[place] = value
        self.damaged.discard(place)
        self.hidden.discard(place)

    def forget(self, place: tuple[str, str]) -> None:
        self.saved.pop(place, None)
        self.damaged.discard(place)
        self.hidden.discard(place)

    def alter(self, place: tuple[str, str], data: bytes) -> None:
        """Change a file in place, at a time of its own: a clock too coarse to tell is another test's matter."""
        self.path_of(place).write_bytes(data)
        self.ticks += 10**9
        os.utime(self.path_of(place), ns=(self.ticks, self.ticks))

    # What users do

    @rule(place=places, value=values, handle=st.integers(0, 1))
    def save(self, place: tuple[str, str], value: int, handle: int) -> None:
        _save(self.handles[handle], place, value)
        self.expected(place, value)

    @rule(place=places, value=values, handle=st.integers(0, 1))
    def save_what_is_not_there_already(self, place: tuple[str, str], value: int, handle: int) -> None:
        state = self.handles[handle].status(*place, _provenance(value)).state
        if place not in self.saved:
            assert state == "absent"
        elif place in self.damaged | self.hidden:
            assert state == "corrupt"
        else:
            assert state == ("same" if self.saved[place] == value else "differs")
        if state != "same":
            _save(self.handles[handle], place, value)
            self.expected(place, value)

    @rule(place=places, value=values, handle=st.integers(0, 1), calls=st.integers(1, 3))
    def save_and_be_killed(self, place: tuple[str, str], value: int, handle: int, calls: int) -> None:
        with killed_at(calls) as replaced, contextlib.suppress(Killed):
            _save(self.handles[handle], place, value)
        if self.path_of(place).name in replaced:
            self.expected(place, value)

    @rule(handle=st.integers(0, 1))
    def open_again(self, handle: int) -> None:
        self.handles[handle] = PersonaVectorStore(MODEL, self.root)

    @rule(handle=st.integers(0, 1))
    def flush(self, handle: int) -> None:
        self.handles[handle].flush()

    @rule(variant=st.sampled_from(VARIANTS), handle=st.integers(0, 1))
    def rebuild(self, variant: str, handle: int) -> None:
        listed = self.listed(variant)
        try:
            assert self.handles[handle].rebuild_manifest(variant) == listed
        except NotStoredError:
            assert not listed
        else:
            self.check_manifest(variant)

    @rule()
    def verify(self) -> None:
        if not self.path_of(("any", "p")).parents[2].is_dir():
            return
        try:
            found = check_saved(self.root)
        except NotStoredError:
            assert not self.saved
            return
        bad = {problem.path for problem in found.problems if problem.kind != "index"}
        assert bad == {self.path_of(place) for place in self.damaged | self.hidden}
        assert found.n_files == len(self.saved)

    @rule()
    def repair(self) -> None:
        try:
            check_saved(self.root, repair=True)
        except NotStoredError:
            assert not self.saved
            return
        for place in self.damaged | self.hidden:
            assert self.path_of(place).with_name(f"{place[1]}.safetensors.damaged").exists()
            self.forget(place)
        if self.saved:
            assert check_saved(self.root).problems == ()

    # What happens to files

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), cut=st.integers(1, 30))
    def truncate(self, data: st.DataObject, cut: int) -> None:
        place = data.draw(st.sampled_from(sorted(self.saved)))
        self.alter(place, self.path_of(place).read_bytes()[:-cut])
        self.damaged.add(place)
        self.hidden.discard(place)

    @precondition(lambda self: set(self.saved) - self.damaged - self.hidden)
    @rule(data=st.data(), position=st.integers(1, 24), flip=st.integers(1, 255))
    def flip_a_byte_of_the_tensor(self, data: st.DataObject, position: int, flip: int) -> None:
        place = data.draw(st.sampled_from(sorted(set(self.saved) - self.damaged - self.hidden)))
        content = bytearray(self.path_of(place).read_bytes())
        content[-position] ^= flip
        self.alter(place, bytes(content))
        self.hidden.add(place)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.saved)))
        self.path_of(place).unlink()
        self.forget(place)

    @rule(
        variant=st.sampled_from(VARIANTS),
        name=st.sampled_from(["manifest.json", "manifest.pending", ".manifest.times"]),
        content=st.sampled_from([None, b"", b"{", b'{"personas": {}}', b'{"id": "p1"}\n', b"\xff\n", NESTED]),
    )
    def spoil_the_index(self, variant: str, name: str, content: bytes | None) -> None:
        path = self.path_of((variant, "any")).with_name(name)
        if content is None:
            path.unlink(missing_ok=True)
        elif path.parent.is_dir():
            path.write_bytes(content)

    # What is always so

    @invariant()
    def every_handle_sees_what_is_there(self) -> None:
        for variant in VARIANTS:
            for handle in self.handles:
                assert handle.list_personas([variant]) == self.listed(variant)
        for place, value in self.saved.items():
            for handle in self.handles:
                if place in self.damaged | self.hidden:
                    with pytest.raises(CorruptFileError):
                        handle.load(*place)
                else:
                    assert handle.load(*place).equal(_vectors(value))
                    assert handle.persona_names([place[1]], [place[0]]) == {place[1]: f"name {value}"}

    @invariant()
    def a_completed_index_says_all_there_is(self) -> None:
        for variant in VARIANTS:
            folder = self.path_of((variant, "any")).parent
            if folder.is_dir() and manifest.is_up_to_date(folder) and (folder / "manifest.json").exists():
                self.check_manifest(variant)

    def listed(self, variant: str) -> list[str]:
        return sorted(persona for where, persona in set(self.saved) - self.damaged if where == variant)

    def check_manifest(self, variant: str) -> None:
        folder = self.path_of((variant, "any")).parent
        if not self.hidden:
            assert sorted(read_as_the_reference_does(folder)) == self.listed(variant)
        assert sorted(json.loads((folder / "manifest.json").read_text())["personas"]) == self.listed(variant)
        assert not [name for name in os.listdir(folder) if name.startswith(".tmp-")]


def _vectors(value: int) -> torch.Tensor:
    return torch.full((2, 3), float(value))


def _provenance(value: int) -> Provenance:
    return msgspec.structs.replace(PROVENANCE, prompts_digest=str(value))


def _save(store: PersonaVectorStore, place: tuple[str, str], value: int) -> None:
    ids = list(PROVENANCE.sample_ids)
    store.save(*place, f"name {value}", _vectors(value), ids, provenance=_provenance(value))


@contextmanager
def killed_at(calls: int) -> Iterator[list[str]]:
    """Let the process seem to die at the given renaming: nothing is renamed, removed or written after it."""
    replaced: list[str] = []
    replace, unlink = os.replace, Path.unlink
    dead = False

    def dying_replace(source: Path, target: Path) -> None:
        nonlocal dead
        dead = dead or len(replaced) + 1 == calls
        if dead:
            raise Killed
        replace(source, target)
        replaced.append(target.name)

    def dying_unlink(path: Path, **options: Any) -> None:
        if dead:
            raise Killed
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        patch.setattr(Path, "unlink", dying_unlink)
        yield replaced


def test_a_store_holds_what_a_dict_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Those about spoilt indexes and damaged files are tested elsewhere.
        run_state_machine_as_test(StoreMachine, settings=settings(max_examples=40, stateful_step_count=25))
