"""The package of toy attacks and defences, for this process and for those that it starts."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOYS = Path(__file__).with_name("toys")


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """Its entry points are found as those of an installed package are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOYS)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TOYS), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "vitrap_toys"]:
            del sys.modules[name]
