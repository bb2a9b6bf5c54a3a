"""The table of jobs as a rank in a Ray cluster sees it: each call asks the controller, which has the file."""

from __future__ import annotations

import threading
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from longvid.batch.table import JobTable, Lease
from longvid.fingerprint import Plain

QUESTIONS = frozenset(name for name in vars(JobTable) if not name.startswith("_")) - {"close"}
"""What may be asked."""


@cache
def remote_table(wire: int) -> RemoteTable:
    """This process's only one: a file descriptor has one end here."""
    return RemoteTable(Connection(wire))


class RemoteTable:
    """A `JobTable` over a connection; any thread may ask. Raises EOFError or OSError when nobody is there."""

    def __init__(self, wire: Connection) -> None:
        self._wire, self._lock = wire, threading.Lock()

    def _ask(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            self._wire.send((name, arguments))
            return self._wire.recv()

    def next_settings(self) -> str | None:
        found: str | None = self._ask("next_settings")
        return found

    def settings(self, key: str) -> str:
        return str(self._ask("settings", key))

    def fail_settings(self, key: str, reason: str) -> None:
        self._ask("fail_settings", key, reason)

    def claim(self, owner: str, settings: str, shape: str = "") -> Lease | None:
        lease: Lease | None = self._ask("claim", owner, settings, shape)
        return lease

    def renew(self, lease: Lease, progress: float) -> bool:
        return bool(self._ask("renew", lease, progress))

    def complete(self, lease: Lease, result: Plain) -> bool:
        return bool(self._ask("complete", lease, result))

    def fail(self, lease: Lease, reason: str) -> bool:
        return bool(self._ask("fail", lease, reason))

    def release(self, lease: Lease) -> bool:
        return bool(self._ask("release", lease))

    def lose(self, lease: Lease, reason: str, max_retries: int) -> bool:
        return bool(self._ask("lose", lease, reason, max_retries))

    def close(self) -> None:
        """Nothing: the process ends with its connection."""
