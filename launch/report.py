"""What ranks and their launcher tell each other through the store: heartbeats, the first failure, the wish to stop.

Pure: the store is whatever has the methods of torch's.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

LEADER = 0
"""The rank that owns the film and speaks to the user."""

PREFIX = "longvid"
FAILED, STOP, TOLD, PREEMPT = "failed", "stop", "told", "preempt"
NOTHING = "-"
"""Stands in a key from the start, for reading one that does not exist would wait for it."""
ASKED, STOPPING, PREEMPTED = "asked", "stopping", "preempted"
"""In STOP: somebody asks the leader to end for the user's sake; the leader ends, and so shall all; or it has saved the
state, and all end. In PREEMPT: a rank was told to make room, and asks the leader to save."""
PREEMPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a process to save and end. mpirun kills on SIGTERM, but passes SIGUSR1 on."""
YES = "yes"
"""In TOLD: the leader has the failure, and tells the user."""


class Store(Protocol):
    """torch.distributed's store, as far as it is used here."""

    def set(self, key: str, value: str, /) -> Any: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def multi_set(self, keys: list[str], values: list[str], /) -> Any: ...


def read(store: Store, key: str) -> str:
    """What a key holds; one that does not exist is made."""
    return store.compare_set(key, "", NOTHING).decode()


def read_all(store: Store, keys: Sequence[str]) -> list[str]:
    """What keys that exist hold."""
    return [value.decode() for value in store.multi_get(list(keys))]


def write_first(store: Store, key: str, value: str) -> str:
    """Write a key that exists, if nothing is there. What it holds then."""
    return store.compare_set(key, NOTHING, value).decode()


def beat_key(rank: int) -> str:
    """Where a rank's heartbeat lies."""
    return f"beat/{rank}"


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life: who it is, and what it is doing, for people."""

    count: int
    name: str
    doing: str = ""
    is_closed: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Beat | None:
        """None if the rank has not begun."""
        return None if text == NOTHING else cls(**json.loads(text))


@dataclass(frozen=True)
class Report:
    """The failure of a rank. `is_lost`: the others say so, for it gives no sign of life."""

    rank: int
    text: str
    is_lost: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Report | None:
        """None if nothing has failed."""
        return None if text == NOTHING else cls(**json.loads(text))


def with_place(text: str, doing: str) -> str:
    """What happened, and what the rank was doing: `rank 3 (stage 1) ended with exit code 1, at forward c5 k3`."""
    return f"{text}, at {doing}" if doing else text


def with_hint(text: str, resume: str) -> str:
    """What happened, and how to go on."""
    return f"{text}; {resume}" if resume else text


def describe_exit(code: int) -> str:
    """How a process ended, by subprocess's return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        return "was killed by signal 9 (SIGKILL; is the machine out of memory?)"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"was killed by signal {-code}"
    return f"was killed by signal {-code} ({name})"
