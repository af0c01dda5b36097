"""The machine part of a record: library versions, processor or GPU, and how much memory the run took."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from vitrap.errors import UserError
from vitrap.experiment.record import Environment, Memory

MOST_THREADS = 1024


def environment(device: torch.device) -> Environment:
    """Versions, processor or GPU and cores; no name of a machine or person."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    libraries = {lib: version(lib) for lib in ("vitrap", "torch", "timm", "torchvision", "torchmetrics", "numpy")}
    return Environment(
        python=platform.python_version(),
        system=platform.system(),
        device=name,
        device_kind=device.type,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        **libraries,
    )


@contextmanager
def computing_threads(count: int | None) -> Iterator[None]:
    """Within the block torch computes with so many threads of the processor; None changes nothing.

    The number decides in which order numbers are added up, and with it the last digits of a result.

    Raises:
        UserError: the number is out of range.
    """
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise UserError(f"threads = {count} is out of range: it must be in [1, {MOST_THREADS}]")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peaks(device: torch.device) -> None:
    """Reset the peaks that `memory` reports, as far as the system allows: a worker process does many runs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> Memory:
    """Peak memory since `reset_peaks`, in bytes; None for the GPU where none is used.

    Outside of Linux the host's peak is that since the process started.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Memory(_host_peak(), on_device)


def _host_peak() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
