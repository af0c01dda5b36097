"""A full disk: one line, no draft, and the next call goes on."""

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import TINY, Said
from tests.full_disk import files_of_at_most


def test_a_disk_that_fills_during_a_run(call: Callable[..., Said], tmp_path: Path) -> None:
    words = ("run", *TINY, "attack.name=badnets", "--device", "cpu", "--out", tmp_path / "runs")
    with files_of_at_most(20_000):  # facts and trigger fit, the model does not
        said = call(*words)
    assert (said.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("vitrap: ")
    assert "model.safetensors' cannot be written or read (File too large); free some space" in line
    assert list(tmp_path.rglob(".*")) == []
    assert call(*words).code == 0
