"""Reads and writes safetensors files: tensors, and texts in their metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitrap.errors import UserError
from vitrap.files import open_file, write_bytes
from vitrap.formats import Table, parse_json


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file.

    Attributes:
        tensors: by their names.
        facts: the texts of its metadata, by their names.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]

    def table(self, name: str) -> Table:
        """The table that the metadata have under this name, as JSON.

        Raises:
            UserError: there is none, or it is damaged. The message has no subject: the caller puts it before.
        """
        if name not in self.facts:
            raise UserError(f"has no {name!r} in its metadata")
        try:
            found = parse_json(self.facts[name])
        except UserError as error:
            raise UserError(f"has metadata that are damaged ({name!r}: {error})") from error
        if not isinstance(found, dict):
            raise UserError(f"has metadata that are damaged ({name!r} is no table)")
        return found


def read_tensor_file(path: str | Path) -> TensorFile:
    """Read a safetensors file, which is on the CPU then.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
        UserError: it is no whole safetensors file. The message has no subject: the caller puts the file's name before.
    """
    open_file(path).close()
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118 - no mapping
    # Beside its own error, the library has others for types of numbers that torch lacks.
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"is no whole safetensors file ({why})") from error


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; `facts` are the texts of its metadata."""
    # Copies, since the format refuses tensors that share memory, as tied weights do.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(copies, dict(facts)))
