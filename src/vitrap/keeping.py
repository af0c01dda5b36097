"""The state of long work in one file, kept now and then: a training, or a fitting, that was killed goes on from there.

On the CPU, with as many threads, it comes to the same end, bit for bit, as if nothing had happened.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrap.errors import UserError
from vitrap.files import whole_file

EVERY = 180.0
"""Seconds between two states, where `VITRAP_STATE_SECONDS` says nothing else."""
SHARE = 0.02
"""Of its time that the work spends on them at most: large states are kept less often."""


@dataclass(frozen=True)
class Position:
    """How far the work is: a training within an epoch, whose loss terms are half gathered, or steps without epochs.

    Attributes:
        epoch: the epoch under way.
        steps: of it that are done.
        order: state of the stream of orders at the epoch's start; None where there is none.
        terms: as `loop.Epoch` has them; 0 for the batches to come.
        counts: as `loop.Epoch` has them.
    """

    epoch: int = 0
    steps: int = 0
    order: UInt8[Tensor, " _"] | None = None
    terms: Mapping[str, Float[Tensor, " batches"]] = field(default_factory=dict)
    counts: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Moving:
    """All that the work changes as it goes on.

    Attributes:
        modules: whose weights change, by name: of a training the model, what is trained along, learned weights of loss
            terms.
        optimiser: what remembers gradients.
        streams: random streams by name. "order" is that of the images' order.
        device: whose own random state counts, beside the CPU's.
        curves: of the epochs so far.
    """

    modules: Mapping[str, nn.Module]
    optimiser: torch.optim.Optimizer
    streams: Mapping[str, torch.Generator]
    device: torch.device
    curves: dict[str, list[float]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, what the optimiser remembers, and random states, by name; not copied."""
        named = ((f"{k}/{key}", t) for k, module in self.modules.items() for key, t in module.state_dict().items())
        found = {name: tensor for name, tensor in named if isinstance(tensor, Tensor)}
        for number, remembered in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser/{number}/{key}": t for key, t in remembered.items() if isinstance(t, Tensor)}
        found |= {f"stream/{name}": generator.get_state() for name, generator in self.streams.items()}
        found["torch/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["torch/cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors are of this work, by names and shapes; it may not have made a step yet."""
        own = self.tensors()
        weights = self._weights()
        theirs = {name: t for name, t in tensors.items() if name.partition("/")[0] not in ("optimiser", "term")}
        if {name: t.shape for name, t in theirs.items()} != {
            name: t.shape for name, t in own.items() if not name.startswith("optimiser/")
        }:
            return False
        remembered = [(key.split("/")[0], t) for key, t in _below(tensors, "optimiser").items()]
        return all(
            number.isdecimal() and int(number) < len(weights) and t.shape in ((), weights[int(number)].shape)
            for number, t in remembered
        )

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back in its place."""
        for name, module in self.modules.items():
            module.load_state_dict(_below(tensors, name), strict=False)  # some modules hold what is no tensor
        remembered: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below(tensors, "optimiser").items():
            number, _, name = key.partition("/")
            remembered.setdefault(int(number), {})[name] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": remembered, "param_groups": groups})
        # A fused step pairs a weight with what is remembered of it in the order of memory.
        for weight, memory in self.optimiser.state.items():
            for key, tensor in memory.items():
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    memory[key] = torch.empty_like(weight).copy_(tensor)
        for name, generator in self.streams.items():
            generator.set_state(tensors[f"stream/{name}"])
        torch.set_rng_state(tensors["torch/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["torch/cuda"], self.device)

    def _weights(self) -> list[Tensor]:
        """What the optimiser trains, by its numbers."""
        return [weight for group in self.optimiser.param_groups for weight in group["params"]]


def state_seconds() -> float:
    """Seconds between two states: `$VITRAP_STATE_SECONDS`, else `EVERY`; infinity where that is 0.

    Raises:
        UserError: the variable holds no number of seconds.
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


class Keeper:
    """Keeps the state of one piece of work in a file, and brings it back to that state.

    Attributes:
        seconds: that the work had taken by the state that it was brought back to.
    """

    def __init__(
        self,
        path: Path | None = None,
        streams: Mapping[str, torch.Generator] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """A keeper of `path`; nothing is read or written yet.

        Args:
            path: a safetensors file; None to keep nothing.
            streams: random streams that the work draws from, beside those that it names itself, by name.
            about: for the file's metadata: what the weights in it carry.
        """
        self.path = path
        self.streams = dict(streams or {})
        self.about = dict(about or {})
        self.seconds = 0.0
        self.every = self.pause = state_seconds()
        self._start = self._last = time.monotonic()

    def resume(self, moving: Moving) -> Position:
        """Bring `moving` back to the state in the file; without one of this work, it stays at its start."""
        if self.path is None:
            return Position()
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            terms = {name: term.to(moving.device) for name, term in _below(tensors, "term").items()}
            position = Position(facts["epoch"], facts["steps"], tensors.get("stream/order"), terms, facts["counts"])
            curves, seconds = facts["curves"], facts["seconds"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return Position()
        if not moving.fits(tensors):
            return Position()
        moving.fill(tensors)
        moving.curves.update(curves)
        self.seconds = seconds
        return position

    def __call__(self, moving: Moving, position: Position) -> None:
        """Keep the state, if the last one is old enough; too little disk or memory for it is no reason to stop."""
        if self.path is None or time.monotonic() - self._last < self.pause:
            return
        begun = time.monotonic()
        with suppress(OSError, SafetensorError, RuntimeError):
            self._write(self.path, moving, position)
        self._last = time.monotonic()
        self.pause = max(self.every, (self._last - begun) / SHARE)

    def _write(self, path: Path, moving: Moving, position: Position) -> None:
        facts: dict[str, Any] = {
            "epoch": position.epoch,
            "steps": position.steps,
            "counts": dict(position.counts),
            "curves": moving.curves,
            "seconds": self.seconds + time.monotonic() - self._start,
        }
        tensors = {**moving.tensors(), **{f"term/{name}": term for name, term in position.terms.items()}}
        if position.order is not None:
            tensors["stream/order"] = position.order
        # A copy of each, since a file holds no tensor twice; then whole or not at all.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        with whole_file(path) as draft:
            save_file(copies, draft, {**self.about, "state": json.dumps(facts)})


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under a name, by the rest of theirs."""
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
