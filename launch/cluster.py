"""A Ray cluster: one that is there, or one of this machine for as long as it is needed; what it has; figures for it.

Ray is an extra, so it is imported when it is asked for.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvid.errors import InputError
from longvid.launch.network import is_loopback

LOCAL = "local"
"""In place of an address: a cluster of this machine alone."""
_OBJECT_STORE_BYTES = 80 << 20
"""Ray's least, about: what goes through it are lines and numbers."""
_CONNECT_S = 10.0
_PRIVATE = {
    # Only so does Ray listen on the loopback alone; it reads this when it is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_GUARD = """
import os, signal, sys
for pid in map(int, sys.stdin.read().split()):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


@dataclass(frozen=True)
class Need:
    """What a gang takes: `ranks` bundles of so many processors, and a GPU each where `gpu`."""

    ranks: int
    threads: int = 1
    gpu: bool = False

    @property
    def bundle(self) -> dict[str, float]:
        """In Ray's words."""
        return {"CPU": float(self.threads), **({"GPU": 1.0} if self.gpu else {})}

    def __str__(self) -> str:
        each = f"{self.threads} CPU{' and a GPU' if self.gpu else ''}"
        return f"{self.ranks} x {each}"


def import_ray() -> Any:
    """Ray. Raises InputError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray, which is not installed: pip install 'longvid[ray]'") from None
    return ray


@contextmanager
def joined(address: str, num_cpus: int = 1) -> Iterator[Any]:
    """Ray, connected to the cluster at an address, or to one of this machine (`local`), which ends with the context.

    A local cluster has this machine's processors, or `num_cpus` if those are more, and listens on the loopback alone.
    A process that is connected already stays so. Raises InputError where the cluster cannot be joined.
    """
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    with ExitStack() as stack:
        if address == LOCAL:
            stack.enter_context(_environment(_PRIVATE))
        ray = import_ray()
        if ray.is_initialized():
            yield ray
            return
        stack.callback(ray.shutdown)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address == LOCAL:
            folder = tempfile.mkdtemp(prefix="longvid-ray-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {
                "num_cpus": max(num_cpus, len(os.sched_getaffinity(0))),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        else:
            _require_somebody(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--ray {address}: cannot be joined from here ({reason})") from None
        if address == LOCAL:
            stack.enter_context(_guarded())
            if not is_loopback(ray.util.get_node_ip_address()):
                raise InputError("--ray local: Ray was imported before, and would listen beyond the loopback")
        yield ray


def _require_somebody(address: str) -> None:
    """Raise InputError where nobody answers at HOST:PORT: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise InputError(f"--ray {address}: give HOST:PORT of the cluster, on one of its machines, or `local`")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: nobody answers there ({error})") from None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that are there for as long as the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _guarded() -> Iterator[None]:
    """Have a process that outlives this one end what Ray started: after a SIGKILL, Ray's agents stay for a minute."""
    command = [sys.executable, "-I", "-S", "-c", _GUARD]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
    assert guard.stdin
    started = descendants(os.getpid()) - {guard.pid}
    guard.stdin.write(" ".join(map(str, started)).encode())
    guard.stdin.flush()
    try:
        yield
    finally:
        guard.send_signal(signal.SIGKILL)
        guard.wait()
        guard.stdin.close()


def descendants(pid: int) -> set[int]:
    """The processes that a process started, and those that they started (Linux)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: set[int] = set()
    left = [pid]
    while left:
        left += (more := children.get(left.pop(), []))
        found.update(more)
    return found


# ------------------------------------------------------------------------------------------------------ what it has


def processors(ray: Any) -> list[int]:
    """The processors of every node that is alive."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def share_of_processors(nodes: Sequence[int], ranks: int) -> int:
    """Threads for each rank: as many as leave every rank a place, and one where there are too few."""
    sizes = range(max(nodes, default=1), 1, -1)
    return next((size for size in sizes if sum(node // size for node in nodes) >= ranks), 1)


def has_gpus(ray: Any, device: str) -> bool:
    """Whether ranks with this `runtime.device` shall have GPUs."""
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


def require_gpus(ray: Any, need: Need) -> None:
    """Raise InputError where this machine's own cluster, which cannot grow, has too few GPUs for a gang."""
    there = int(ray.cluster_resources().get("GPU", 0))
    if need.gpu and there < need.ranks:
        raise InputError(f"--ray local: {need.ranks} ranks need a GPU each, and this machine has {there}")


def shortage(ray: Any, need: Need) -> str:
    """What is waited for: `waiting for room for 2 x 1 CPU: 1 of the cluster's 4 CPUs are free`."""
    free, all_there = ray.available_resources(), ray.cluster_resources()
    kinds = ("CPU", "GPU") if need.gpu else ("CPU",)
    states = [f"{free.get(kind, 0):g} of the cluster's {all_there.get(kind, 0):g} {kind}s are free" for kind in kinds]
    return f"waiting for room for {need}: {', '.join(states)}"


# -------------------------------------------------------------------------------------------------------------- figures


class Figures:
    """Figures that Ray's dashboard shows and its agents export to Prometheus, for each film and gang."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = ("film", "gang")
        self._progress = Gauge("longvid_progress", "Share of a film's work that is done.", tag_keys=tags)
        self._frames = Counter("longvid_frames_total", "Frames that were finished.", tag_keys=tags)
        self._films = Counter("longvid_films_total", "Films that were completed.", tag_keys=tags)
        self._lost = Counter("longvid_gangs_lost_total", "Gangs that were lost.", tag_keys=tags)

    def progress(self, film: str, gang: int, share: float) -> None:
        self._progress.set(share, tags=_tags(film, gang))

    def frames(self, film: str, gang: int, count: int) -> None:
        if count > 0:
            self._frames.inc(count, tags=_tags(film, gang))

    def film_done(self, film: str, gang: int) -> None:
        self.progress(film, gang, 1.0)
        self._films.inc(1, tags=_tags(film, gang))

    def gang_lost(self, film: str, gang: int) -> None:
        self._lost.inc(1, tags=_tags(film, gang))


def _tags(film: str, gang: int) -> dict[str, str]:
    return {"film": film, "gang": str(gang)}
