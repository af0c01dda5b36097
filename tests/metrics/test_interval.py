"""Wilson's interval against statsmodels, and the centre of a sample."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from vitrap.metrics.interval import Z95, Centre, Rate, centre, rate, wilson

SIZES = (1, 2, 3, 7, 10, 43, 100, 999, 12_630)
MANY = [(hits, n) for n in SIZES for hits in sorted({0, 1, n // 3, n // 2, n - 1, n})]


@pytest.mark.parametrize(("hits", "n"), MANY)
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    found = wilson(hits, n)
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


@given(st.integers(1, 100_000), st.floats(0, 1))
def test_the_interval_holds_the_value_and_has_a_mirror(n: int, share: float) -> None:
    hits = round(share * n)
    found, mirrored = wilson(hits, n), wilson(n - hits, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low), abs=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_the_ends_are_exact(n: int) -> None:
    assert wilson(0, n).low == 0.0
    assert wilson(n, n).high == 1.0
    assert 0 < wilson(0, n).high < 1
    assert 0 < wilson(n, n).low < 1


def test_without_cases_nothing_is_known() -> None:
    assert wilson(0, 0) == Rate(0.0, 0.0, 1.0, 0)
    assert rate(torch.zeros(0, dtype=torch.bool)) == Rate(0.0, 0.0, 1.0, 0)


def test_the_constant_is_the_normal_distributions() -> None:
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-14) == Z95


def test_a_rate_counts_true_entries() -> None:
    assert rate(torch.tensor([True, False, True, True])) == wilson(3, 4)


def test_the_centre() -> None:
    assert centre(torch.tensor([4.0, 1.0, 10.0])) == Centre(5.0, 4.0)
    assert centre(torch.tensor([4.0, 1.0, 10.0, 3.0])) == Centre(4.5, 3.0), "of two middle values the lower"
    values = torch.rand(101, generator=torch.Generator().manual_seed(0))
    assert centre(values).mean == pytest.approx(np.mean(values.numpy()))
    assert centre(values).median == pytest.approx(np.median(values.numpy()))
