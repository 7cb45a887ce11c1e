"""Which text stands for which, and that a probe text does for what it is made for."""

import random
from collections.abc import Iterator

import pytest
import torch
from fakes import LONGEST, small_limits, texts_that_share
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_persona.backends.probes import Findings, Probe, texts_by_kind
from tl_persona.backends.shortcuts import Exposure, next_best, placed_texts, stands_for
from tl_persona.plan.passes import pass_tokens
from tl_persona.plan.plan import Plan, Sharing, make_plan
from tl_persona.tensors import Sample

HOOKS = ["blocks.0.hook_resid_post"]


def plans(seed: int) -> Iterator[tuple[Plan, list[int]]]:
    """A plan and what it falls back to, with lengths at which a model may change."""
    draw = random.Random(seed)
    critical = sorted({draw.randint(1, LONGEST) for _ in range(draw.randint(0, 2))})
    limits = draw.choice([1, 4]), draw.choice([1, 12]), draw.choice([8, 16, 40, 100]), draw.choice([1, 3, 8])
    with small_limits(*limits):
        plan = make_plan(
            texts_that_share(draw),
            batch_tokens=draw.choice([1, 30, 90, 400]),
            max_rows=draw.choice([None, 1, 3]),
            sharing=Sharing.PACKED,
        )
        for _ in range(4):
            yield plan, critical
            plan = next_best(plan)


def probes_of(plan: Plan, critical: list[int]) -> Iterator[tuple[Probe, list[Exposure]]]:
    """The probes of a plan, each with the exposures of the texts that were not covered before it."""
    findings = Findings()
    for texts in texts_by_kind(plan, critical).values():
        left = texts
        while left:
            probe = findings.probe("way", plan, [left[0], *texts], critical)
            yield probe, [text.exposure for text in left]
            findings.add("way", probe, HOOKS)
            assert len(left) > len(findings.left("way", left, HOOKS)), "a probe that stands for nothing"
            left = findings.left("way", left, HOOKS)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_a_probe_stands_for_the_text_it_was_made_of_and_is_of_its_kind(seed: int) -> None:
    for plan, critical in plans(seed):
        for probe, left in probes_of(plan, critical):
            assert stands_for(probe.text.exposure, left[0])
            again = [text for text in placed_texts(probe.plan, critical) if text.kind == probe.text.kind]
            assert probe.text.exposure in [text.exposure for text in again]


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_the_pieces_of_a_probe_are_its_text_from_the_first_token_to_the_last(seed: int) -> None:
    for plan, critical in plans(seed):
        for probe, _ in probes_of(plan, critical):
            each, text = probe.passes[-1], probe.plan.samples[probe.text.member]
            tokens = pass_tokens(probe.plan, each)
            parts = [pass_tokens(probe.plan, probe.passes[0])[0]] if len(probe.passes) > 1 else []
            parts += [tokens[probe.text.row, begin : begin + len(segment)] for begin, segment in probe.pieces]
            assert torch.equal(torch.cat(parts), text.input_ids)
            assert torch.equal(probe.plan.given[probe.text.member].input_ids[: len(text.input_ids)], text.input_ids)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_company_in_the_row_never_has_the_texts_own_token_where_that_would_stand(seed: int) -> None:
    for plan, critical in plans(seed):
        for probe, _ in probes_of(plan, critical):
            own = probe.plan.given[probe.text.member].input_ids.tolist()
            if probe.plan is plan or len(set(torch.cat([each.input_ids for each in plan.given]).tolist())) < 3:
                continue
            row = pass_tokens(probe.plan, probe.passes[-1])[probe.text.row].tolist()
            (last, piece), context = probe.pieces[-1], probe.text.exposure.context
            mine = {at for begin, part in probe.pieces for at in range(begin, begin + len(part))}
            # What it would see there whole: before its last piece by the place in the row, behind it by what goes on.
            before = {at: context + at for at in range(last) if at not in mine}
            behind = range(last + len(piece), last + len(piece) + probe.text.exposure.followers)
            instead = {**before, **{at: piece.stop + at - behind.start for at in behind}}
            assert not [at for at, there in instead.items() if there < len(own) and row[at] == own[there]]


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_most_plans_take_few_probes(seed: int) -> None:
    for plan, critical in plans(seed):
        kinds = len(texts_by_kind(plan, critical))
        assert len(list(probes_of(plan, critical))) <= kinds + len(plan.samples)


def test_a_persona_takes_one_probe_whose_pass_is_less_than_two_of_the_plan() -> None:
    draw = random.Random(0)
    start = [draw.randrange(1000) for _ in range(600)]
    lengths = range(40, 88, 2)
    ids = [torch.tensor(start + [draw.randrange(1000) for _ in range(length)]) for length in lengths]
    samples = [Sample(str(len(each)), each, torch.ones((1, len(each)), dtype=torch.bool)) for each in ids]
    plan = make_plan(samples, batch_tokens=512, sharing=Sharing.PACKED)
    ((probe, _),) = probes_of(plan, [2048])
    assert len(probe.plan.given[probe.text.member].input_ids) == 600 + max(lengths)
    assert probe.passes[0].tokens_run == 600
    assert probe.passes[-1].tokens_run <= 2 * max(each.tokens_run for each in plan.passes[1:])
    company = [one for one in range(len(probe.plan.samples)) if one != probe.text.member]
    assert not any(torch.equal(probe.plan.samples[one].input_ids, ids[-1]) for one in company), "a copy beside it"


@pytest.mark.parametrize("field", Exposure._fields)
def test_one_integer_that_is_larger_is_not_stood_for(field: str) -> None:
    one = Exposure(90, 92, 2, 40, 50, 2, 31, 60, 3, 4, 1, 3)
    assert stands_for(one, one) and stands_for(one, one._replace(**{field: 0}))
    assert not stands_for(one, one._replace(**{field: getattr(one, field) + 1}))
