"""Writing safetensors files, and reading them again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vitrap.errors import UserError
from vitrap.tensor_file import read_tensor_file, write_tensor_file


def test_tensors_of_any_layout_and_tied_weights_are_written_as_they_are(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    tensors = {"one": weight, "tied": weight, "turned": weight.t(), "repeated": torch.ones(1).expand(4)}
    tensors["last"] = torch.rand(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    write_tensor_file(tmp_path / "x.safetensors", tensors, {"role": "test"})
    found = read_tensor_file(tmp_path / "x.safetensors")
    assert found.facts == {"role": "test"}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"one": torch.ones(9)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_tensor_file(path)
