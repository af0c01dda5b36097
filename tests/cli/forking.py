"""A process with everything imported that forks a `vitrap` for each line of stdin, and may kill it at a moment.

A line is JSON: the words of the call, a file for what it says, its --out, the event at which it dies (0: never),
`within`: a kind of stage, the signal that it gets there, and after how many training steps (null: none), and variables
of its environment. An event is an operation on a file below --out, just before it is done. For each line comes one on
stdout: how it ended (minus the signal's number, where it was killed) and how many events there were.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import vitrap.cli.main as cli
import vitrap.experiment.run  # noqa: F401 - so that a fork need not

EVENTS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


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


def child(call: dict[str, Any], report: int) -> None:
    count, out, dies_at = 0, call["out"], call["dies_at"]

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in EVENTS and args and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(out):
            count += 1
            if count == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    log = os.open(call["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["vitrap", *call["words"]]
    os.environ |= call["environment"]
    if call["within"]:
        stop_within(*call["within"], out)
    sys.addaudithook(hook)
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, str(count).encode())
    os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        read, write = os.pipe()
        if (process := os.fork()) == 0:
            child(call, write)
        os.close(write)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([code, int(os.read(read, 20) or b"0")]), flush=True)
        os.close(read)


if __name__ == "__main__":
    serve()
