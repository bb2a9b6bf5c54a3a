"""The watchdog of a rank: heartbeats, and the end of all ranks when one is lost, fails or is interrupted.

Each rank has a thread with a connection of its own to the store where the ranks met. Every second it writes what the
rank is doing, and reads whether somebody failed. The leader (rank 0) looks at everybody's heartbeats, the others at the
leader's. The first report of a failure holds; all ranks end by it.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from longvid.errors import InputError, Interrupted, LongvidError, Preempted, RuntimeFailure
from longvid.launch.env import RankEnv
from longvid.launch.network import listening_address
from longvid.launch.report import (
    ASKED,
    FAILED,
    LEADER,
    NOTHING,
    PREEMPT,
    PREEMPT_SIGNALS,
    PREEMPTED,
    PREFIX,
    STOP,
    STOPPING,
    TOLD,
    YES,
    Beat,
    Report,
    Store,
    beat_key,
    read,
    read_all,
    with_hint,
    with_place,
    write_first,
)
from longvid.preemption import Preemption

STDERR = 2
_REPEAT_S = 1.0
"""Signals that come together are one: a service manager and the launcher may both send it."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds. `connect_s` is for finding the store, `store_s` for one answer of it.

    A rank is lost when the one that watches it has read the same heartbeat for `lost_s`, counted in its own rounds of
    `beat_s`: on a machine that sleeps, or starves all ranks, the count waits too. A RuntimeError waits `settle_s` for
    a better reason than its own, since a rank that dies makes its neighbours' messages fail first. `end_s` is what a
    process has to end by itself. A store that does not answer for `silent_s`, counted alike, is lost with whoever
    hosts it.
    """

    beat_s: float = 1.0
    lost_s: float = 6.0
    settle_s: float = 2.0
    end_s: float = 3.0
    connect_s: float = 300.0
    store_s: float = 30.0
    silent_s: float = 12.0


class _Word(Enum):
    """What other threads and signal handlers tell the watcher, beside errors."""

    CLOSE = "close"
    STOP = "stop"
    PREEMPT = "preempt"


@dataclass
class _Sight:
    """A heartbeat as it was read last, and in how many rounds since."""

    text: str = NOTHING
    rounds: int = 0

    def see(self, text: str) -> int:
        self.rounds = self.rounds + 1 if text == self.text else 0
        self.text = text
        return self.rounds


class Watch:
    """A rank's watchdog, as a context. What leaves it decides how all ranks end:

    - Nothing: this rank is done, and the others go on.
    - KeyboardInterrupt or Interrupted: all ranks stop, the others with exit code 130.
    - Preempted, on the leader: all ranks stop, the others with Preempted too.
    - Any other exception is this rank's failure, and ends all. A RuntimeError that only follows from another rank's
      failure is replaced by that one, so that all ranks tell the same.

    `name(rank)` says which rank is meant and `status()` what this one is doing, both for people. `on_failure(error)` is
    called once, when another rank failed (RuntimeFailure) or the user stopped the work (Interrupted): it shall make the
    main thread raise that error. All three are called in the watcher's thread. A process that has not ended `end_s`
    later is ended with the error's exit code, 3 or 130; the leader tells it by `say` first. `resume` says how to go on.

    In the main thread the context takes SIGINT and SIGTERM: on the leader they are a KeyboardInterrupt, on the others
    they only ask the leader to stop. With `preemption` the leader's SIGTERM is left to the handler that it has, and the
    others' comes to it. Entering the context raises RuntimeFailure when the store cannot be reached.
    """

    def __init__(
        self,
        env: RankEnv,
        *,
        name: Callable[[int], str],
        status: Callable[[], str],
        on_failure: Callable[[LongvidError], None],
        resume: str = "",
        limits: Limits | None = None,
        preemption: Preemption | None = None,
        say: Callable[[str], object] = lambda line: os.write(STDERR, f"{line}\n".encode()),
    ) -> None:
        assert env.rendezvous is not None, "a lone rank has nobody to watch"
        self._env, self._rendezvous = env, env.rendezvous
        self._name, self._status, self._on_failure, self._say = name, status, on_failure, say
        self._resume, self._limits, self._preemption = resume, limits or Limits(), preemption
        self._inbox: queue.SimpleQueue[_Word | Exception] = queue.SimpleQueue()
        self._verdict: Future[Exception] = Future()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._guard = threading.Thread(target=self._run_guard, name="watch the watch", daemon=True)
        self._ending = threading.Lock()
        self._handlers: dict[int, Any] = {}
        self._last_signal = -_REPEAT_S
        self._is_stopping = self._is_failing = False
        self._num_beats = 0
        self._sights = {rank: _Sight() for rank in (range(1, env.world_size) if self._leads else [LEADER])}

    def __enter__(self) -> Watch:
        self._store = self._connect()
        self._thread.start()
        self._guard.start()
        if threading.current_thread() is threading.main_thread():
            others = PREEMPT_SIGNALS if self._preemption else (signal.SIGTERM,)
            for number in (signal.SIGINT, *(() if self._preemption and self._leads else others)):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt | Interrupted | Preempted):
                self.stop()
            elif isinstance(error, Exception):
                verdict = self.fail(error)
                if verdict is not error:
                    raise verdict from error
                return
            self.close()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """End all ranks for the user's sake: on the leader, at once; on another, by asking the leader."""
        self._inbox.put(_Word.STOP)

    def fail(self, error: Exception) -> Exception:
        """Report that this rank failed. Returns what it shall raise: this error, or the one that it follows from."""
        self._inbox.put(error)
        try:
            verdict = self._verdict.result(self._limits.settle_s + self._limits.store_s)
        except TimeoutError:
            return error
        return verdict if _may_follow(error) else error

    def close(self) -> None:
        """This rank is done, and shall not be missed."""
        self._inbox.put(_Word.CLOSE)
        if not self._verdict.done():
            self._thread.join(self._limits.store_s)

    @property
    def _leads(self) -> bool:
        return self._env.rank == LEADER

    def _connect(self) -> Store:
        place, limits = self._rendezvous, self._limits
        c10d: Any = dist  # torch does not say that it exports its stores
        # Rank 0 hosts the store where the launcher does not; torch.distributed shares one on the same port.
        listener = self._listen() if self._leads and not place.is_hosted else None
        try:
            server = c10d.TCPStore(
                place.host,
                place.port,
                is_master=listener is not None,
                timeout=timedelta(seconds=limits.connect_s),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listener,
            )
            server.set_timeout(timedelta(seconds=limits.store_s))
            store: Store = c10d.PrefixStore(f"{PREFIX}/{place.attempt}", server)
            if self._leads:
                store.multi_set([beat_key(rank) for rank in self._sights], [NOTHING] * len(self._sights))
            for key in (FAILED, STOP, PREEMPT, beat_key(LEADER)):
                read(store, key)
        except dist.DistError as error:
            raise RuntimeFailure(f"the ranks' store at {place.host}:{place.port} cannot be reached") from error
        return store

    def _listen(self) -> int:
        """The store's socket, a file descriptor: on this rank's address for the others, and not on all it has."""
        place = self._rendezvous
        if place.listener is not None:
            return place.listener
        address = listening_address(place.host, is_one_machine=self._env.is_one_machine)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            server = socket.create_server((address, place.port), family=family, backlog=4 * self._env.world_size + 64)
        except OSError as error:
            raise InputError(
                f"the ranks shall meet at {place.host}:{place.port}, but rank {LEADER} cannot listen there "
                f"({error.strerror}): MASTER_ADDR must be its machine, MASTER_PORT a free port"
            ) from None
        return server.detach()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._preemption and number in PREEMPT_SIGNALS:
            self._inbox.put(_Word.PREEMPT)
            return
        self._inbox.put(_Word.STOP)
        now = time.monotonic()
        if self._leads and now - self._last_signal >= _REPEAT_S:
            self._last_signal = now
            raise KeyboardInterrupt

    # --------------------------------------------------------------------------------------------- the watcher's thread

    def _run(self) -> None:
        try:
            error = self._watch()
        except dist.DistError:
            error = self._failure(f"{self._name(LEADER)} or the launcher is gone: the connection to its store broke")
        if error is not None:
            self._end(error)

    def _run_guard(self) -> None:
        """End this rank when the store does not answer: a connection over a cable that is cut stays open for long."""
        limits, count, rounds = self._limits, self._num_beats, 0
        while self._thread.is_alive() and not self._verdict.done():
            time.sleep(limits.beat_s)
            rounds = rounds + 1 if self._num_beats == count else 0
            count = self._num_beats
            if rounds * limits.beat_s >= limits.silent_s:
                place = f"{self._rendezvous.host}:{self._rendezvous.port}"
                silence = f"the ranks' store at {place} has not answered for {limits.silent_s:g} s"
                self._end(self._failure(f"{silence}: {self._name(LEADER)}, the launcher or the network is gone"))

    def _watch(self) -> Exception | None:
        """Beat, read and look until something ends it. None: this rank is done."""
        next_round = time.monotonic()
        while True:
            word = self._next_word(next_round)
            if word is None:
                next_round = time.monotonic() + self._limits.beat_s
                if error := self._round():
                    return error
            elif word is _Word.STOP:
                self._stop()
            elif word is _Word.PREEMPT:
                write_first(self._store, PREEMPT, ASKED)
            elif word is _Word.CLOSE:
                self._leave()
                return None
            elif isinstance(word, Exception):
                self._is_failing = True
                return self._settle(word)

    def _next_word(self, until: float) -> _Word | Exception | None:
        """What this process says; None when the time has come."""
        try:
            return self._inbox.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None

    def _round(self) -> LongvidError | None:
        self._beat()
        if self._env.supervisor is not None and os.getppid() != self._env.supervisor:
            return self._failure("the launcher is gone")
        if self._is_stopping:
            return None
        failed, stop, preempt, *beats = read_all(self._store, [FAILED, STOP, PREEMPT, *map(beat_key, self._sights)])
        if error := self._decided(failed, stop):
            return error
        if preempt == ASKED and self._leads and self._preemption and not self._preemption.is_asked:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if stop == ASKED and self._leads:
            self._stop()
            # A real signal wakes a main thread that waits for a lock; its handler raises.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return None
        return self._look(beats)

    def _decided(self, failed: str, stop: str) -> LongvidError | None:
        """What the store says of all ranks' end."""
        if report := Report.decode(failed):
            return self._failure(report.text)
        return {STOPPING: Interrupted("interrupted"), PREEMPTED: Preempted()}.get(stop)

    def _look(self, beats: Sequence[str]) -> LongvidError | None:
        """Look at heartbeats, and report the first rank that has been silent for too long."""
        limits = self._limits
        for (rank, sight), text in zip(self._sights.items(), beats, strict=True):
            if sight.see(text) * limits.beat_s < limits.lost_s:
                continue
            beat = Beat.decode(text)
            if beat is not None and not beat.is_closed:
                silence = f"{beat.name} has given no sign of life for {limits.lost_s:g} s"
                return self._report(Report(rank, with_place(silence, beat.doing), is_lost=True))
        return None

    def _settle(self, error: Exception) -> Exception:
        """Report this rank's own error, unless it follows from what others report meanwhile. What shall be raised."""
        if self._is_stopping:
            return error
        if _may_follow(error) and (reason := self._wait_for_reason()):
            return reason
        what = str(error) if isinstance(error, LongvidError) else f"{type(error).__name__}: {error}"
        report = Report(self._env.rank, with_place(f"{self._name(self._env.rank)} failed: {what}", self._status()))
        first = Report.decode(write_first(self._store, FAILED, report.encode()))
        return error if first in (None, report) else self._failure(first.text)

    def _wait_for_reason(self) -> LongvidError | None:
        until = time.monotonic() + self._limits.settle_s
        while True:
            reason = self._decided(*read_all(self._store, [FAILED, STOP]))
            if reason is not None or time.monotonic() >= until:
                return reason
            time.sleep(0.1)

    def _report(self, report: Report) -> LongvidError:
        """Tell all ranks of a failure. Whoever was first is right."""
        first = Report.decode(write_first(self._store, FAILED, report.encode()))
        return self._failure((first or report).text)

    def _failure(self, text: str) -> RuntimeFailure:
        return RuntimeFailure(with_hint(text, self._resume))

    def _beat(self, *, is_closed: bool = False) -> None:
        self._num_beats += 1
        beat = Beat(self._num_beats, self._name(self._env.rank), self._status(), is_closed)
        self._store.set(beat_key(self._env.rank), beat.encode())

    def _stop(self) -> None:
        if self._leads:
            self._is_stopping = True
            is_preempted = self._preemption is not None and self._preemption.is_asked
            self._store.set(STOP, PREEMPTED if is_preempted else STOPPING)
        else:
            write_first(self._store, STOP, ASKED)

    def _leave(self) -> None:
        """The last heartbeat. The rank whose process holds the store goes last."""
        with suppress(dist.DistError):  # it needs nobody any more
            self._beat(is_closed=True)
            if not self._leads or self._rendezvous.is_hosted:
                return
            until = time.monotonic() + self._limits.end_s
            while time.monotonic() < until:
                beats = map(Beat.decode, read_all(self._store, [*map(beat_key, self._sights)]))
                if all(beat is None or beat.is_closed for beat in beats):
                    return
                time.sleep(0.05)

    def _end(self, error: Exception) -> None:
        """Have the main thread end this process by an error, and do it where that cannot."""
        until = time.monotonic() + self._limits.end_s
        with self._ending:
            if self._verdict.done():  # the store answered after all, when it had been given up
                return
            self._verdict.set_result(error)
        try:
            if self._is_failing:
                self._tell()
            elif isinstance(error, LongvidError):
                self._on_failure(error)
        finally:
            self._enforce(error, until)

    def _enforce(self, error: Exception, until: float) -> None:
        """Wait for the process to end. It does not return unless the main thread is done in order after all."""
        while (word := self._next_word(until)) is not None:
            if word is _Word.CLOSE:
                with suppress(dist.DistError):
                    self._beat(is_closed=True)
                return
            if isinstance(word, Exception):
                self._tell()
        if self._leads and not self._is_failing and not isinstance(error, Interrupted):
            self._say(f"longvid: error: {error}")
        os._exit(error.exit_code if isinstance(error, LongvidError) else RuntimeFailure.exit_code)

    def _tell(self) -> None:
        """The main thread has the verdict: what comes of it, it says itself."""
        self._is_failing = True
        if self._leads:
            with suppress(dist.DistError):
                self._store.set(TOLD, YES)


def _may_follow(error: Exception) -> bool:
    """Whether an error may come of another rank's failure: RuntimeFailure, and what torch raises for connections."""
    return isinstance(error, RuntimeError)
