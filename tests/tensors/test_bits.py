"""Bits that differ, against hand-made examples and Python's own view of a float."""

import struct

import pytest
import torch

from vitrap.tensors.bits import bits_apart, count_changes


@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [
        (1.0, 1.0, 0),
        (1.0, -1.0, 1),  # the sign
        (0.0, -0.0, 1),
        (1.0, 2.0, 8),  # exponents 01111111 and 10000000
        (2.0, 4.0, 1),  # 10000000 and 10000001
        (1.0, 1.5, 1),  # the first bit of the fraction
        (0.0, -float("inf"), 9),  # the sign and eight bits of the exponent
    ],
)
def test_by_hand(one: float, other: float, bits: int) -> None:
    assert bits_apart(torch.tensor([one]), torch.tensor([other])).tolist() == [bits]


def test_as_python_stores_them() -> None:
    numbers = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    one, other = numbers[0].T, numbers[1].T  # not contiguous
    found = bits_apart(one, other)

    def stored(number: float) -> int:
        return struct.unpack("<I", struct.pack("<f", number))[0]

    wanted = [
        [(stored(a) ^ stored(b)).bit_count() for a, b in zip(*rows, strict=True)]
        for rows in zip(one.tolist(), other.tolist(), strict=True)
    ]
    assert found.tolist() == wanted


def test_changes_of_a_network_are_counted_once_each() -> None:
    before = {"fc.weight": torch.tensor([[1.0, 2.0], [0.5, 0.0]]), "fc.bias": torch.tensor(3.0), "n": torch.tensor(7)}
    after = {"fc.weight": torch.tensor([[-1.0, 4.0], [0.5, 0.0]]), "fc.bias": torch.tensor(3.0), "n": torch.tensor(8)}
    assert count_changes(before, after) == {"weights": 5, "changed weights": 2, "changed bits": 2}
    assert count_changes(before, before) == {"weights": 5, "changed weights": 0, "changed bits": 0}
