"""Which rank this process is, from the variables of whoever launched it. Pure.

torchrun, `longvid render --ranks` and our seats in a Ray cluster set variables of their own, inside whatever started
them, so theirs hold. mpirun
may have been started inside a Slurm step of another shape, so Slurm's hold only where nobody else's do. DeepSpeed's
launcher sets torchrun's, and some of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from longvid.errors import InputError
from longvid.launch.hosts import hosts_of

Launcher = Literal["local", "ray", "torchrun", "deepspeed", "openmpi", "mpich", "slurm"]

SUPERVISOR = "LONGVID_SUPERVISOR"
"""The process id of what started this rank, if it is ours: `longvid render --ranks`, or a seat in a Ray cluster."""
SEAT = "LONGVID_SEAT"
"""Beside SUPERVISOR: that is a seat in a Ray cluster."""
LISTENER, WIRE = "LONGVID_LISTENER", "LONGVID_WIRE"
"""File descriptors that a seat hands on: the socket of rank 0's store, and the way to ask the controller."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""The network interface of messages between CPUs."""
_SLURM_PORTS = range(15000, 31000)
"""Below those that Linux gives to anybody's connections."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet: the store of torch.distributed's env:// method.

    `is_hosted`: the launcher hosts it; else rank 0 does. `attempt` counts a launcher's restarts, which share a store.
    `listener` is rank 0's socket (a file descriptor) where it listens already.
    """

    host: str
    port: int
    is_hosted: bool = False
    attempt: int = 0
    listener: int | None = None


@dataclass(frozen=True)
class RankEnv:
    """A process's place among those that were launched together. `local` is within its machine.

    `rendezvous` is None for a lone rank, and where the ranks shall meet over MPI. `supervisor` is the process that ends
    this one, if it is ours. `interface` is the user's choice of a network interface. `wire` is a file descriptor over
    which the controller of a Ray cluster can be asked.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher
    rendezvous: Rendezvous | None = None
    supervisor: int | None = None
    interface: str | None = None
    wire: int | None = None

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks are on this machine, as far as the launcher says."""
        return self.local_world_size == self.world_size

    def variables(self) -> dict[str, str]:
        """What torch.distributed reads: MPI and Slurm do not set it."""
        numbers = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        found = dict(zip(_NAMES["torchrun"], map(str, numbers), strict=True))
        if self.rendezvous:
            found |= {"MASTER_ADDR": self.rendezvous.host, "MASTER_PORT": str(self.rendezvous.port)}
        return found | ({INTERFACE: self.interface} if self.interface else {})

    def how_to_meet(self) -> str:
        """What a user can do for ranks that do not know where to meet."""
        return _how_to_meet(self.launcher)


def rank_of(environ: Mapping[str, str]) -> RankEnv | None:
    """The place that the launcher's variables give; None for a plain process.

    Raises InputError, naming the variables, for sets that are incomplete, no numbers, or contradict each other.
    """
    places = list(_places(environ))
    if not places:
        return None
    first = places[0]
    for other in places[1:]:
        if (other.rank, other.world_size) != (first.rank, first.world_size):
            raise InputError(
                f"two launchers disagree on which rank this is: {first} ({first.launcher}), but {other} "
                f"({other.launcher}): start the ranks with one of them"
            )
    local_rank = _first(place.local_rank for place in places)
    local_world_size = _first(place.local_world_size for place in places)
    if local_rank is None:
        if first.world_size > 1:
            raise InputError(f"{first.names[2]} is not set, but {first}")
        local_rank = 0
    if local_world_size is None:
        # All on one machine: a wrong guess leaves cores idle, no more.
        local_world_size = first.world_size
    if local_rank >= local_world_size or local_world_size > first.world_size:
        raise InputError(f"local rank {local_rank} of {local_world_size} does not fit {first}")
    rendezvous = _meeting(environ, places) if first.world_size > 1 else None
    is_ours, is_seated = first.launcher in ("local", "ray"), first.launcher == "ray"
    if is_seated and rendezvous and first.rank == 0:
        rendezvous = replace(rendezvous, listener=_number(environ, LISTENER))
    return RankEnv(
        first.rank,
        first.world_size,
        local_rank,
        local_world_size,
        first.launcher,
        rendezvous,
        supervisor=_number(environ, SUPERVISOR) if is_ours else None,
        interface=environ.get(INTERFACE) or None,
        wire=_number(environ, WIRE) if is_seated else None,
    )


@dataclass(frozen=True)
class _Place:
    """What one launcher says. `names` are its variables, in the order of the numbers."""

    launcher: Launcher
    names: tuple[str, ...]
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None

    def __str__(self) -> str:
        return f"{self.names[0]}={self.rank} and {self.names[1]}={self.world_size}"


_NAMES: dict[Launcher, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def _places(environ: Mapping[str, str]) -> Iterator[_Place]:
    """What each launcher says that has a say, the innermost first."""
    if SUPERVISOR in environ:
        place = _place(environ, "ray" if SEAT in environ else "local", _NAMES["torchrun"])
        if place is None:
            raise InputError(f"RANK and WORLD_SIZE are not set, but {SUPERVISOR} is")
        yield place
        return
    is_torchrun = "TORCHELASTIC_RUN_ID" in environ
    like_torchrun: Launcher = "deepspeed" if "CROSS_SIZE" in environ and not is_torchrun else "torchrun"
    launchers: tuple[Launcher, ...] = (like_torchrun, "openmpi", "mpich")
    torch, *mpi = [_place(environ, launcher, _NAMES[launcher]) for launcher in launchers]
    if torch is not None and is_torchrun:
        yield torch
        return
    found = [place for place in (torch, *mpi) if place is not None]
    yield from found
    slurm = _slurm(environ)
    if slurm is None:
        return
    agrees = all((slurm.rank, slurm.world_size) == (place.rank, place.world_size) for place in found)
    if agrees or all(place is None for place in mpi):
        yield slurm


def _place(environ: Mapping[str, str], launcher: Launcher, names: Sequence[str]) -> _Place | None:
    """One launcher's numbers; None if it set none."""
    if not any(name in environ for name in names):
        return None
    rank, world_size, *local = (_number(environ, name) for name in names)
    if rank is None or world_size is None:
        missing = names[0] if rank is None else names[1]
        present = next(name for name in names if name in environ)
        raise InputError(f"{missing} is not set, but {present} is")
    if rank >= world_size:
        raise InputError(f"{names[0]}={rank} must be less than {names[1]}={world_size}")
    return _Place(launcher, tuple(names), rank, world_size, local[0], local[1] if len(local) > 1 else None)


def _slurm(environ: Mapping[str, str]) -> _Place | None:
    """What srun says to a task of a step of several. A batch script has SLURM_PROCID too, but no step's size."""
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    if size is None or size == 1:
        return None
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    place = _place(environ, "slurm", names)
    return place and replace(place, local_world_size=_tasks_here(environ))


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """The step's tasks on this node, from a list such as `2(x3),1`; None if Slurm does not say."""
    node = _number(environ, "SLURM_NODEID")
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if match is None or node is None:
            return None
        nodes = int(match[2] or 1)
        if node < nodes:
            return int(match[1])
        node -= nodes
    return None


def _meeting(environ: Mapping[str, str], places: Sequence[_Place]) -> Rendezvous | None:
    """Where several ranks meet: as the variables say, else on the first node of a Slurm step, else over MPI (None)."""
    rendezvous = _rendezvous(environ)
    launchers = [place.launcher for place in places]
    if rendezvous is None and "slurm" in launchers:
        rendezvous = _slurm_rendezvous(environ)
    if rendezvous is None and not {"openmpi", "mpich"}.intersection(launchers):
        raise InputError(f"MASTER_ADDR and MASTER_PORT are not set, but {places[0]}: {_how_to_meet(launchers[0])}")
    return rendezvous


def _slurm_rendezvous(environ: Mapping[str, str]) -> Rendezvous | None:
    """On the first node of the step, where task 0 is; steps and jobs have ports of their own."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    node_list = next((environ[name] for name in names if environ.get(name)), None)
    if node_list is None:
        return None
    numbers = [_number(environ, name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    port = _SLURM_PORTS[(31 * numbers[0] + numbers[1]) % len(_SLURM_PORTS)]
    return Rendezvous(next(hosts_of(node_list)), port)


def _rendezvous(environ: Mapping[str, str]) -> Rendezvous | None:
    host, port = environ.get("MASTER_ADDR"), _number(environ, "MASTER_PORT")
    if not host and port is None:
        return None
    if not host or port is None:
        missing, present = ("MASTER_PORT", "MASTER_ADDR") if host else ("MASTER_ADDR", "MASTER_PORT")
        raise InputError(f"{missing} is not set, but {present} is")
    if not 1 <= port <= 65535:
        raise InputError(f"MASTER_PORT={port} must be from 1 to 65535")
    is_hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Rendezvous(host, port, is_hosted, _number(environ, "TORCHELASTIC_RESTART_COUNT") or 0)


def _how_to_meet(launcher: Launcher) -> str:
    address = "MASTER_ADDR=HOST MASTER_PORT=29500, where HOST is rank 0's machine"
    match launcher:
        case "openmpi":
            return "mpirun -x " + address.replace(" MASTER_PORT", " -x MASTER_PORT")
        case "mpich":
            return "mpirun -genv " + address.replace("=", " ").replace(" MASTER_PORT", " -genv MASTER_PORT")
        case "slurm":
            host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            return f"before srun, export MASTER_ADDR={host} MASTER_PORT=29500"
        case _:
            return f"export {address}"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{name}={text!r} must be a whole number of 0 or more")
    return int(text)


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)
