"""SIGTERM (and SIGUSR1) as pre-emption: what it does to a process that renders."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from longvid.errors import Preempted
from longvid.launch.local import REPEAT_S
from longvid.launch.report import PREEMPT_SIGNALS
from longvid.preemption import END_S, SAVE_S, Preemption


@contextmanager
def preempted_by_sigterm(preemption: Preemption, tell: Callable[[str], None]) -> Iterator[None]:
    """Have SIGTERM ask for pre-emption, in the main thread.

    The render then saves its state and raises Preempted. Where it cannot in `SAVE_S` seconds, and where it has not
    begun, the main thread gets a KeyboardInterrupt, which leaves this context as Preempted. A second SIGTERM does the
    same at once. A process that still runs after `END_S` is ended, with one line for the user.
    """

    end = threading.Timer(END_S, _end_now, [tell])
    end.daemon = True

    def on_signal(number: int, frame: FrameType | None) -> None:
        if preemption.is_asked:
            if time.monotonic() - preemption.asked_at >= REPEAT_S:
                raise KeyboardInterrupt
            return
        preemption.ask()
        end.start()
        if not preemption.is_awaited:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, SAVE_S)

    handlers = {**dict.fromkeys(PREEMPT_SIGNALS, on_signal), signal.SIGALRM: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except KeyboardInterrupt:
        if preemption.is_asked:
            raise Preempted("stopped before the work began; the same command starts it again") from None
        raise
    finally:
        end.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now(tell: Callable[[str], None]) -> None:
    tell("longvid: stopped: what is under way did not end in time; the same command with --resume goes on")
    os._exit(Preempted.exit_code)
