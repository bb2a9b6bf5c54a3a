"""Pre-emption: the wish that a render saves its state and ends, since its machine is wanted for something else."""

from __future__ import annotations

import threading
import time

SAVE_S, END_S = 16.0, 28.0
"""Seconds after it was asked: no longer waits a render for its next checkpoint, and no longer runs its process.

Clusters give 30 s before they kill; closing the checkpoint that is under way may take what lies between.
"""


class Preemption:
    """Asked for once, from any thread.

    `is_awaited` says that a render is at work which looks at it; until then there is nothing to save.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.asked_at = 0.0
        """When it was asked for, by time.monotonic."""
        self.is_awaited = False

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        if not self.is_asked:
            self.asked_at = time.monotonic()
            self._asked.set()
