"""Cuts the samples of a plan into groups that are sent together: what a failure costs."""

import torch

from tl_persona.plan.plan import Plan


def groups_of(plan: Plan, limit: int) -> list[list[int]]:
    """Samples in the caller's order, cut where the tokens that a group computes would pass the limit.

    A beginning that a sample shares with the one before it is counted once a group. A sample that is longer than the
    limit is a group of its own.
    """
    groups: list[list[int]] = []
    filled = 0
    for index, sample in enumerate(plan.samples):
        ids = sample.input_ids
        if groups:
            added = len(ids) - _shared(ids, plan.samples[index - 1].input_ids)
            if filled + added <= limit:
                groups[-1].append(index)
                filled += added
                continue
        groups.append([index])
        filled = len(ids)
    return groups


def _shared(first: torch.Tensor, second: torch.Tensor) -> int:
    """Tokens that two texts begin with alike."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
