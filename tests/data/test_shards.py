"""Which personas a shard has, and how a process finds out which shard it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_persona.data.shards import Shard, looks_like_a_batch_script, own_device, parse_shard, shard_from_environment
from tl_persona.errors import InputError

COUNTS = st.integers(1, 12)
ITEMS = st.lists(st.integers(), max_size=40)


def shards(count: int) -> list[Shard]:
    return [Shard(index, count) for index in range(count)]


def array_environ(task: int, first: int, last: int, step: int = 1, count: int | None = None) -> dict[str, str]:
    n_tasks = len(range(first, last + 1, step)) if count is None else count
    values = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": n_tasks}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def srun_environ(task: int, count: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(task), "SLURM_NTASKS": str(count), "SLURM_STEP_ID": "0"}


def test_an_item_goes_to_the_shard_of_its_position_modulo_their_number() -> None:
    assert Shard(1, 3).of(["zero", "one", "two", "three", "four"]) == ["one", "four"]
    assert Shard(2, 3).of(["zero", "one"]) == []


@given(items=ITEMS, count=COUNTS)
def test_shards_are_disjoint_complete_and_in_order(items: list[int], count: int) -> None:
    places = list(enumerate(items))
    parts = [shard.of(places) for shard in shards(count)]
    assert sorted(place for part in parts for place in part) == places  # each place once: disjoint and complete
    assert all(part == sorted(part) for part in parts)


@given(items=ITEMS, count=COUNTS)
def test_shards_differ_by_one_item_at_most(items: list[int], count: int) -> None:
    sizes = [len(shard.of(items)) for shard in shards(count)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(outer=COUNTS, inner=COUNTS, items=ITEMS)
def test_shards_of_shards_are_shards_of_the_whole(outer: int, inner: int, items: list[int]) -> None:
    both = [small.within(large) for large in shards(outer) for small in shards(inner)]
    assert [(shard.index, shard.count) for shard in both] == [(i, outer * inner) for i in range(outer * inner)]
    assert sorted(x for shard in both for x in shard.of(items)) == sorted(items)


@given(first=st.integers(0, 50), step=st.integers(1, 9), count=COUNTS)
def test_a_slurm_array_of_any_range_and_step_covers_every_shard_once(first: int, step: int, count: int) -> None:
    ids = range(first, first + step * count, step)
    # SLURM reports the last id that there is, not the end of the range that was asked for.
    found = [shard_from_environment(array_environ(task, ids[0], ids[-1], step)) for task in ids]
    assert [(shard.index, shard.count) for shard in found] == [(i, count) for i in range(count)]


def test_an_array_that_starts_at_one_starts_with_the_first_shard() -> None:
    assert str(shard_from_environment(array_environ(1, 1, 4))) == "0/4"
    assert str(shard_from_environment(array_environ(7, 1, 7, step=2))) == "3/4"


@pytest.mark.parametrize(
    "environ",
    [
        array_environ(3, 0, 7, count=3),  # --array=0,3,7
        array_environ(4, 1, 7, step=2, count=4),
        array_environ(8, 1, 7) | {"SLURM_ARRAY_TASK_COUNT": "9"},
    ],
)
def test_array_ids_with_gaps_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"have gaps .* --array=0-7"):
        shard_from_environment(environ)


def test_an_array_task_outside_its_array_is_refused() -> None:
    with pytest.raises(InputError, match=r"SLURM_ARRAY_TASK_ID: there is no shard 9/8; they count from 0: 0/8 to 7/8"):
        shard_from_environment(array_environ(9, 0, 7))


def test_srun_and_torchrun_number_their_processes_from_zero() -> None:
    assert str(shard_from_environment(srun_environ(3, 4))) == "3/4"
    assert str(shard_from_environment({"RANK": "0", "WORLD_SIZE": "2"})) == "0/2"


def test_torchrun_within_srun_counts_alone() -> None:
    assert str(shard_from_environment(srun_environ(1, 2) | {"RANK": "5", "WORLD_SIZE": "8"})) == "5/8"


def test_a_step_with_fewer_tasks_than_its_job_counts_its_own() -> None:
    assert str(shard_from_environment(srun_environ(1, 8) | {"SLURM_STEP_NUM_TASKS": "2"})) == "1/2"


@pytest.mark.parametrize("inner", [srun_environ(1, 4), {"RANK": "1", "WORLD_SIZE": "4"}], ids=["srun", "torchrun"])
def test_processes_within_an_array_task_share_its_part(inner: dict[str, str]) -> None:
    assert str(shard_from_environment(array_environ(2, 0, 9) | inner)) == "9/40"


def test_a_batch_script_in_an_array_is_one_process() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # as sbatch sets them, without a step id
    interactive = script | {"SLURM_STEP_ID": "4294967290"}
    for environ in (script, interactive):
        assert str(shard_from_environment(array_environ(2, 0, 9) | environ)) == "2/10"


def test_a_batch_script_without_srun_is_told_from_a_task() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert looks_like_a_batch_script(script)
    assert not looks_like_a_batch_script(srun_environ(0, 4))
    assert not looks_like_a_batch_script(script | {"RANK": "0", "WORLD_SIZE": "2"})
    assert not looks_like_a_batch_script(script | {"SLURM_NTASKS": "1"})


def test_auto_without_a_launcher_is_refused() -> None:
    with pytest.raises(InputError, match=r"no SLURM_ARRAY_TASK_ID, SLURM_PROCID or RANK .* give --shard I/N"):
        parse_shard("auto", {"HOME": "/"})


@pytest.mark.parametrize("text", ["1", "1/2/3", "-1/4", "a/b", "1/ 4", "½/2", "", "AUTO"])
def test_a_text_that_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write I/N with I from 0 to N - 1"):
        parse_shard(text, {})


@pytest.mark.parametrize("text", ["4/4", "0/0"])
def test_a_shard_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"there is no shard {text}"):
        parse_shard(text, {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "SLURM_ARRAY_TASK_MIN is not set"),
    ],
)
def test_a_variable_that_is_missing_or_no_number_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shard_from_environment(environ)


def test_each_process_of_a_machine_takes_a_device_of_its_own() -> None:
    assert [own_device({"LOCAL_RANK": str(rank)}, 4) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert own_device({"SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}, 4) == "cuda:2"
    # SLURM may show each task one device only, which is then its number 0.
    assert own_device({"SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}, 1) == "cuda:0"
    assert own_device({"LOCAL_RANK": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, 4) == "cuda:1"


def test_without_cuda_or_a_launcher_no_device_is_chosen() -> None:
    assert own_device({"LOCAL_RANK": "1"}, 0) is None
    assert own_device({}, 4) is None
    assert own_device({"SLURM_LOCALID": "0"}, 4) is None  # a batch script
