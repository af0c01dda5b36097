"""CDA, ASR and RA, worked by hand."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from vitrap.contracts import AllToOne
from vitrap.metrics.accuracy import attack_success, clean_accuracy, robust_accuracy
from vitrap.metrics.interval import wilson

TRUE = torch.tensor([0, 0, 1, 1, 2, 2, 2])
PREDICTED = torch.tensor([0, 1, 0, 1, 0, 0, 1])


def test_by_hand() -> None:
    assert clean_accuracy(PREDICTED, TRUE) == wilson(2, 7)
    assert attack_success(PREDICTED, TRUE, AllToOne(0)) == wilson(3, 5)
    assert robust_accuracy(PREDICTED, TRUE, AllToOne(0)) == wilson(1, 5)
    assert attack_success(PREDICTED, TRUE, AllToOne(1)) == wilson(2, 5)
    assert robust_accuracy(PREDICTED, TRUE, AllToOne(1)) == wilson(1, 5)


@pytest.mark.parametrize("measure", [attack_success, robust_accuracy])
def test_images_of_the_target_class_do_not_count(measure: Callable) -> None:
    wanted = measure(PREDICTED, TRUE, AllToOne(0))
    for prediction in (0, 1, 2):
        changed = torch.where(TRUE == 0, prediction, PREDICTED)
        assert measure(changed, TRUE, AllToOne(0)) == wanted


@pytest.mark.parametrize("measure", [attack_success, robust_accuracy])
def test_a_test_set_of_the_target_class_alone_says_nothing(measure: Callable) -> None:
    assert measure(torch.tensor([0, 1]), torch.tensor([1, 1]), AllToOne(1)) == wilson(0, 0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_asr_and_ra_never_exceed_1_together(seed: int, target: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted, true = torch.randint(4, (2, 50), generator=generator)
    asr, ra = (measure(predicted, true, AllToOne(target)) for measure in (attack_success, robust_accuracy))
    assert asr.value + ra.value <= 1 + 1e-12
    assert asr.n == ra.n == int((true != target).sum())
    assert clean_accuracy(predicted, true).value == pytest.approx(accuracy_score(true.numpy(), predicted.numpy()))
