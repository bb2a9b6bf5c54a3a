"""SIGTERM asks a render to save, and ends a process that does not: real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from longvid.errors import Preempted
from longvid.launch import signals
from longvid.launch.signals import preempted_by_sigterm
from longvid.preemption import Preemption


def sleep() -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_work_a_signal_ends_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="stopped before the work began"), preempted_by_sigterm(Preemption(), print):
        os.kill(os.getpid(), number)
        sleep()
    assert signal.getsignal(number) is before


def test_work_is_asked_and_given_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAVE_S", 0.3)
    preemption, asked = Preemption(), []
    preemption.is_awaited = True
    with pytest.raises(Preempted), preempted_by_sigterm(preemption, print):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # one that comes together with it is no other
        asked.append(preemption.is_asked)
        sleep()
    assert asked == [True] and time.monotonic() - preemption.asked_at >= 0.3


def test_work_that_ends_in_time_ends_as_it_does() -> None:
    preemption, before = Preemption(), set(threading.enumerate())
    preemption.is_awaited = True
    with preempted_by_sigterm(preemption, print):
        os.kill(os.getpid(), signal.SIGTERM)
        timers = [thread for thread in set(threading.enumerate()) - before if isinstance(thread, threading.Timer)]
    assert len(timers) == 1, "one would end this process"
    timers[0].join(60)
    assert not timers[0].is_alive()
    assert preemption.is_asked and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_ctrl_c_is_another_thing() -> None:
    with pytest.raises(KeyboardInterrupt), preempted_by_sigterm(Preemption(), print):
        raise KeyboardInterrupt


DEAF = """
import os, signal, time
from longvid.launch import signals
from longvid.preemption import Preemption
signals.END_S, preemption = 0.5, Preemption()
preemption.is_awaited = True
with signals.preempted_by_sigterm(preemption, lambda line: print(line, flush=True)):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""


def test_a_process_that_does_not_end_is_ended_with_a_word() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", DEAF], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("longvid: stopped: ") and done.stdout.endswith("with --resume goes on\n")
