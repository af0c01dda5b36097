"""The memory limit: amounts, units, and what is none."""

import pytest

from vitrap.errors import UserError
from vitrap.memory import memory_limit


@pytest.mark.parametrize(
    ("amount", "wanted"),
    [
        ("4GB", 4 * 10**9), ("512 MiB", 2**29), ("1.5g", 1_500_000_000), ("1024", 1024), ("20kb", 20_000),
        ("1TiB", 2**40), ("0", 0), ("", 4 * 2**30),
    ],
)  # fmt: skip
def test_a_memory_limit(monkeypatch: pytest.MonkeyPatch, amount: str, wanted: int) -> None:
    monkeypatch.setenv("VITRAP_MEMORY", amount)
    assert memory_limit() == wanted


@pytest.mark.parametrize("amount", ["lots", "-3", "1e9", "4XB", "5ib", "GB", "1 2", "nan"])
def test_a_memory_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, amount: str) -> None:
    monkeypatch.setenv("VITRAP_MEMORY", amount)
    with pytest.raises(UserError, match=f"memory limit '{amount}' is no amount of memory; give --memory or VITRAP_"):
        memory_limit()
