"""Saving the state of long work (a training, or a long `fit`) now and then, so that killed work can be resumed.

The state is one file. Work that is resumed on the CPU, with the same number of threads, ends in the same result, bit
for bit, as work that was never killed.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.formats import adapter
from vitrap.tensor_file import read_tensor_file, write_tensor_file

EVERY = 180.0
"""The default number of seconds between two states; `VITRAP_STATE_SECONDS` changes it."""
SHARE = 0.02
"""The greatest share of the work's time that saving may take: large states are saved less often."""
ORDER = "order"
"""The name, in `train.loop.Streams`, of the stream that orders the images.

It is saved as it was at the start of the epoch, so that the epoch's order can be drawn again.
"""


@dataclass(frozen=True)
class Position:
    """How far the work is: in a training, a place within an epoch; in other work, a number of steps.

    Attributes:
        epoch: the current epoch.
        steps: steps of that epoch that are done.
        order: state of the random stream of orders at the start of the epoch; None where there is none.
        terms: the loss terms of the epoch, as in `loop.Epoch`; 0 for the batches to come.
        counts: the image counts of the epoch, as in `loop.Epoch`.
    """

    epoch: int = 0
    steps: int = 0
    order: UInt8[Tensor, " _"] | None = None
    terms: Mapping[str, Float[Tensor, " batches"]] = field(default_factory=dict)
    counts: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Facts:
    """What of a state is no tensor, as JSON in the file's metadata."""

    epoch: int
    steps: int
    counts: dict[str, list[int]]
    curves: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True)
class TrainingState:
    """All that changes while the work goes on, and so must be saved.

    Attributes:
        modules: the modules whose weights change, by name: of a training the model, the modules trained along, and
            learned weights of loss terms.
        optimiser: the optimiser, whose state (momentum) is saved.
        streams: random streams by name; that of the images' order is `ORDER`.
        device: the device whose random state is saved, beside the CPU's.
        curves: the curves of the epochs so far.
    """

    modules: Mapping[str, nn.Module]
    optimiser: torch.optim.Optimizer
    streams: Mapping[str, torch.Generator]
    device: torch.device
    curves: dict[str, list[float]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser state and random states, by name; not copied."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found |= {f"{name}/{key}": t for key, t in module.state_dict().items() if isinstance(t, Tensor)}
        for number, state in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser/{number}/{key}": t for key, t in state.items() if isinstance(t, Tensor)}
        found |= {f"stream/{name}": generator.get_state() for name, generator in self.streams.items()}
        found["torch/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["torch/cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` are a state of this work, by names and shapes; the optimiser may have no state yet."""
        weights = self._weights()
        own = {name: t.shape for name, t in self.tensors().items() if not name.startswith("optimiser/")}
        theirs = {name: t.shape for name, t in tensors.items() if name.partition("/")[0] not in ("optimiser", "term")}
        if theirs != own:
            return False
        # The optimiser's state belongs to weights by their number: scalars, or tensors of the weight's shape.
        for key, tensor in _below(tensors, "optimiser").items():
            number = key.split("/")[0]
            if not number.isdecimal() or int(number) >= len(weights):
                return False
            if tensor.shape not in ((), weights[int(number)].shape):
                return False
        return True

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state that `tensors` returned."""
        for name, module in self.modules.items():
            module.load_state_dict(_below(tensors, name), strict=False)  # the state of some modules is not all tensors
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below(tensors, "optimiser").items():
            number, _, name = key.partition("/")
            states.setdefault(int(number), {})[name] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": states, "param_groups": groups})
        # A fused step reads a weight and its state in the order of memory, so both need the same memory layout.
        for weight, state in self.optimiser.state.items():
            for key, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    state[key] = torch.empty_like(weight).copy_(tensor)
        for name, generator in self.streams.items():
            generator.set_state(tensors[f"stream/{name}"])
        torch.set_rng_state(tensors["torch/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["torch/cuda"], self.device)

    def _weights(self) -> list[Tensor]:
        """The weights that the optimiser trains, in the order of its numbers."""
        return [weight for group in self.optimiser.param_groups for weight in group["params"]]


def state_seconds() -> float:
    """Seconds between two states: `$VITRAP_STATE_SECONDS`, or else `EVERY`; infinity where the variable is 0.

    Raises:
        UserError: the variable is no number of seconds.
    """
    chosen = os.environ.get("VITRAP_STATE_SECONDS", "").strip()
    try:
        seconds = float(chosen) if chosen else EVERY
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise UserError(
            f"VITRAP_STATE_SECONDS = {chosen!r} is no number of seconds; set it to 180, say, or to 0 to keep no states"
        )
    return seconds or math.inf


class Checkpointer:
    """Saves the state of one piece of work to a file, and resumes the work from it.

    Call it between steps; it saves only where the last state is old enough.

    Attributes:
        seconds: the time that the work had taken when the state from which it was resumed was saved.
    """

    def __init__(
        self,
        path: Path | None = None,
        streams: Mapping[str, torch.Generator] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Make a checkpointer; nothing is read or written yet.

        Args:
            path: a safetensors file; None to save nothing.
            streams: random streams that the work draws from, by name, beside those that it names itself.
            about: entries for the file's metadata, such as what its weights carry.
        """
        self.path = path
        self.streams = dict(streams or {})
        self.about = dict(about or {})
        self.seconds = 0.0
        self.every = self.pause = state_seconds()
        self._start = self._last = time.monotonic()

    def resume(self, state: TrainingState) -> Position:
        """Load the state in the file into `state`, and return its position; without such a state, the start."""
        if self.path is None:
            return Position()
        try:
            file = read_tensor_file(self.path)
            facts = adapter(_Facts).validate_json(json.dumps(file.table("state")), strict=True)
        except (OSError, ValueError):  # errors of pydantic's and of vitrap's are ValueErrors
            return Position()
        tensors = file.tensors
        terms = {name: term.to(state.device) for name, term in _below(tensors, "term").items()}
        position = Position(facts.epoch, facts.steps, tensors.get(f"stream/{ORDER}"), terms, facts.counts)
        if not state.fits(tensors):
            return Position()
        state.fill(tensors)
        state.curves.update(facts.curves)
        self.seconds = facts.seconds
        return position

    def __call__(self, state: TrainingState, position: Position) -> None:
        """Save the state if the last one is old enough. The work goes on where disk or memory are too small for it."""
        if self.path is None or time.monotonic() - self._last < self.pause:
            return
        begun = time.monotonic()
        with suppress(OSError, MemoryError, RuntimeError):
            self._write(self.path, state, position)
        self._last = time.monotonic()
        self.pause = max(self.every, (self._last - begun) / SHARE)

    def _write(self, path: Path, state: TrainingState, position: Position) -> None:
        """Write the state as one file, which replaces the last."""
        facts: dict[str, Any] = {
            "epoch": position.epoch,
            "steps": position.steps,
            "counts": dict(position.counts),
            "curves": state.curves,
            "seconds": self.seconds + time.monotonic() - self._start,
        }
        tensors = {**state.tensors(), **{f"term/{name}": term for name, term in position.terms.items()}}
        if position.order is not None:
            tensors[f"stream/{ORDER}"] = position.order
        write_tensor_file(path, tensors, {**self.about, "state": json.dumps(facts)})


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `name` and a slash, by the rest of their names."""
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
