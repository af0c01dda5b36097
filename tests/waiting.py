"""Waiting for what is to happen, however long a busy machine takes for it.

Nothing that waits in a test has a clock of its own: what hangs is ended by pytest (`faulthandler_timeout` in
pyproject.toml), which then shows where every thread stood.
"""

import subprocess
import time
from collections.abc import Callable


def wait_until(true: Callable[[], object], *working: subprocess.Popen[str]) -> None:
    """Wait until something is so; that one of the processes `working` on it has ended before is an error."""
    while not true():
        for process in working:
            assert process.poll() is None or true(), process.communicate()
        time.sleep(0.05)
