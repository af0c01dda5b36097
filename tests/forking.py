"""A process with everything imported that forks a `vitrap` for each line of stdin, and may disturb it.

A line is JSON, a call of `forks.Forks.call`. For each line comes one on stdout: how the call ended (minus the signal's
number, where it was killed), the operations that change files below its folder, just before they were done, and what it
wrote to stdout and stderr.

A fault is a kind and a number n:
    kill   SIGKILL before the n-th operation
    full   from the n-th operation on, the disk has no room for another file or another byte
    small  no file can grow beyond n bytes
    torn   killed while a file grows beyond n bytes
"""

import contextlib
import errno
import gc
import json
import math
import mmap
import multiprocessing
import os
import resource
import selectors
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import vitrap.cli.main as cli
import vitrap.resuming as resuming
import vitrap.sweeps.workers as workers
from vitrap.cli import console

GROW = {"open", "os.mkdir", "os.link", "os.symlink"}
"""Operations for which a full disk has no room, named as Python's audit events are."""
CHANGE = GROW | {"os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


def target(event: str, args: tuple) -> str | None:
    """The absolute path that an operation changes; None where it changes none."""
    if event not in CHANGE or not isinstance(args[0], (str, bytes, os.PathLike)):
        return None
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return None
    within = args[-1] if event in ("os.remove", "os.rmdir") else -1  # the folder that shutil.rmtree holds open
    return os.path.join(os.getcwd() if within == -1 else os.readlink(f"/proc/self/fd/{within}"), os.fsdecode(args[0]))


def no_growth(most: int, signal_handler: signal.Handlers = signal.SIG_IGN) -> None:
    """From now on a file that grows beyond so many bytes is an error or, with SIG_DFL, this process's death."""
    signal.signal(signal.SIGXFSZ, signal_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def disturbing(folder: str, kind: str, number: int, report: int) -> Callable[[str, tuple], None]:
    """An audit hook that reports each operation below the folder, and does what a fault of this kind does at it."""
    count = mmap.mmap(-1, 8)  # which worker processes share

    def hook(event: str, args: tuple) -> None:
        path = target(event, args)
        if path is None or not path.startswith(f"{folder}{os.sep}"):
            return
        n = int.from_bytes(count[:], "little") + 1
        count[:] = n.to_bytes(8, "little")
        os.write(report, f"{event.removeprefix('os.')} {path.removeprefix(folder + os.sep)}\n".encode())
        if kind == "kill" and n == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and n >= number:
            no_growth(0)
            if event in GROW:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])

    return hook


def stop_within(kind: str, signal_number: int, steps: int, out: str) -> None:
    """Send this process a signal in the given training step that is made for a stage of this kind."""
    left = steps

    def stop(*_: object) -> None:
        nonlocal left
        left -= bool(list(Path(out).glob(f"stages/.{kind}-*-draft")))
        if not left:
            handle.remove()
            os.kill(os.getpid(), signal_number)

    handle = register_optimizer_step_post_hook(stop)


def child(call: dict[str, Any], said: int, told: int, report: int) -> None:
    os.dup2(said, 1)
    os.dup2(told, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    workers.get_context = lambda _: multiprocessing.get_context("fork")  # quick to start, and disturbed, too
    os.chdir(call["at"] or ".")
    sys.argv = ["vitrap", *call["words"]]
    os.environ |= call["environment"]
    if call["within"]:
        stop_within(*call["within"], call["folder"])
        resuming.SHARE = math.inf  # a state before each step, where it is asked for often
    kind, number = call["fault"] or ("", 0)
    sys.addaudithook(disturbing(call["folder"], kind, number, report))
    if kind in ("small", "torn"):
        no_growth(number, signal.SIG_DFL if kind == "torn" else signal.SIG_IGN)
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def everything(pipes: list[int]) -> list[str]:
    """All that comes out of these pipes, until nobody can write to them any more."""
    found = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                if block := os.read(key.fd, 1 << 16):
                    found[key.fd] += block
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return [text.decode(errors="replace") for text in found.values()]


def warm_up(words: list[str]) -> None:
    """Do a call here, so that each fork finds imported and set up whatever it needs."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        sys.argv = ["vitrap", *words, "--out", folder]
        console.out.file = console.err.file = nothing
        with contextlib.suppress(SystemExit):
            cli.main()
    console.out.file = console.err.file = None


def serve() -> None:
    torch.set_num_threads(1)
    console.PATIENCE = threading.TIMEOUT_MAX  # no bars, which come or not with the machine's load
    ours = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {ours[os.getpid() % len(ours)]})  # so that a sweep's worker has one thread, too
    warm_up(sys.argv[1:])
    gc.collect()
    gc.freeze()  # no fork looks through what is here already
    print("ready", flush=True)
    for line in sys.stdin:
        pipes = [os.pipe() for _ in range(3)]
        if (process := os.fork()) == 0:
            child(json.loads(line), *(write for _, write in pipes))
        for _, write in pipes:
            os.close(write)
        out, err, operations = everything([read for read, _ in pipes])
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([code, operations.splitlines(), out, err]), flush=True)


if __name__ == "__main__":
    serve()
