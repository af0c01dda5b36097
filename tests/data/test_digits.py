"""The embedded digits are scikit-learn's."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import vitrap.data.sources


def test_they_are_those_of_scikit_learn_in_its_order() -> None:
    grey, labels = load_digits(return_X_y=True)
    with np.load(Path(vitrap.data.sources.__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        assert np.array_equal(stored["images"].reshape(-1, 64), grey)
        assert np.array_equal(stored["labels"], labels)
