"""What holds for all tests, and how those with real ranks start them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not fail a test that is right.
settings.register_profile("longvid", deadline=None)
settings.load_profile("longvid")

RunWorker = Callable[[str, Path, float], int]


@pytest.fixture(scope="session")
def run_worker() -> RunWorker:
    """Run a test file as the program that forks its ranks, in a folder and for so many seconds at most.

    Gives its exit code. What it printed is `log` in the folder.
    """
    return _run_worker


def _run_worker(file: str, folder: Path, timeout_s: float) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # no library shall have threads to lose at a fork
    command = [sys.executable, "-P", file, str(folder)]
    with (
        (folder / "log").open("w") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            return process.wait(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
