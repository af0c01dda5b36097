"""Goals: what triggered images become, which of them count, and what is no goal."""

import pytest
import torch

from vitrap.errors import UserError
from vitrap.goals import AllToAll, AllToOne, Goal, SourceToTarget, make_goal


@pytest.mark.parametrize(
    ("goal", "labels", "counts"),
    [
        (AllToOne(2), [2, 2, 2, 2], [True, True, False, True]),
        (AllToAll(4), [1, 2, 3, 0], [True, True, True, True]),
        (SourceToTarget(1, 3), [0, 3, 2, 3], [False, True, False, False]),
    ],
)
def test_labels_and_counts_by_hand(goal: Goal, labels: list[int], counts: list[bool]) -> None:
    true = torch.arange(4)
    assert isinstance(goal, Goal)
    assert goal.labels(true).tolist() == labels
    assert goal.counts(true).tolist() == counts


def test_a_goal_by_its_name() -> None:
    assert make_goal("all-to-one", 10, 3) == AllToOne(3)
    assert make_goal("all-to-all", 10, 0) == AllToAll(10)
    assert make_goal("source-to-target", 10, 3, 4) == SourceToTarget(4, 3)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("all-to-one", 1, "source = 1 means nothing with goal = 'all-to-one'; leave it out"),
        ("all-to-all", 0, "source = 0 means nothing"),
        ("all-to-all", None, "target = 3 means nothing with goal = 'all-to-all'; leave it out"),
        ("source-to-target", None, "source = None is no source"),
        ("source-to-target", 3, "source = 3 is no source .* other than the target 3"),
    ],
)
def test_a_source_where_none_is_wanted_or_none_where_one_is(name: str, source: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_goal(name, 10, 3, source)  # type: ignore[arg-type]
