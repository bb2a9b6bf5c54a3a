"""This process: its device and threads, and its place among the ranks that a launcher started."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from longvid.chips import CPU, chip_of
from longvid.errors import InputError, LongvidError
from longvid.kernels import native
from longvid.kernels.dispatch import backend_for
from longvid.launch.env import rank_of
from longvid.meshes import choose_mesh
from longvid.models.configs import Configs
from longvid.models.families import known_sizes
from longvid.parallel.collectives import broadcast, connect, gather
from longvid.parallel.mesh import Mesh, lone_mesh, make_mesh
from longvid.plan import ModelFacts
from longvid.settings import Settings

T = TypeVar("T")


def pick_device(settings: Settings) -> torch.device:
    """The device of the settings: on CUDA this rank's own, by its index, for what is only called `cuda` is the current
    one of whichever thread, and of other libraries the first. Raises InputError when it is not there.
    """
    wanted = settings.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda was asked for, but torch finds no CUDA device")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    environment = rank_of(os.environ)
    own = torch.cuda.current_device() if environment is None else environment.local_rank % torch.cuda.device_count()
    return torch.device("cuda", own)


def describe_kernels(device: torch.device, *, sparse: bool) -> str:
    """Whose instructions compute: those of another kind of processor round differently."""
    if device.type == "cpu":
        matrix_units = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
        own = f"{torch.backends.cpu.get_cpu_capability()}, {matrix_units}, {native.isa() or 'torch alone'}"
    else:
        own = torch.cuda.get_device_name(device)
    return f"{own}, {backend_for(device)}" if sparse else own


def set_threads(settings: Settings) -> None:
    """The threads of this rank: those of the settings, else its share of the machine's cores."""
    environment = rank_of(os.environ)
    if settings.runtime.threads:
        torch.set_num_threads(settings.runtime.threads)
    elif environment and environment.local_world_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))


def on_leader(mesh: Mesh, work: Callable[[], T]) -> T:
    """What the leader makes, on every rank; and what it raises of our errors."""
    if mesh.topology.num_ranks == 1:
        return work()
    result: T | LongvidError | None = None
    if mesh.is_leader:
        try:
            result = work()
        except LongvidError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, LongvidError):
        raise result
    assert result is not None
    return result


def require_own(gpus: Sequence[tuple[str, str]]) -> None:
    """Raise InputError where two ranks have one GPU, by each rank's (host, GPU): NCCL would end all with a riddle."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != rank:
            own = "start as many ranks a machine as it has GPUs, or give each its own by CUDA_VISIBLE_DEVICES"
            raise InputError(f"runtime.device: ranks {first} and {rank} have the same GPU of {gpu[0]}: {own}")


def join_mesh(settings: Settings, facts: ModelFacts, configs: Configs) -> Mesh:
    """This process's place among the ranks that a launcher started; a lone one without a launcher."""
    environment = rank_of(os.environ)
    num_ranks, device = environment.world_size if environment else 1, pick_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is on the first one
    try:
        chip = chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else CPU
        topology = choose_mesh(num_ranks, settings, facts, known_sizes(configs) if num_ranks > 1 else None, chip)
    except InputError as error:
        started = (
            f"the launcher started {num_ranks} (WORLD_SIZE={num_ranks})" if environment else "no launcher started any"
        )
        raise InputError(f"{error}; {started}") from None
    if num_ranks == 1 or environment is None:
        return lone_mesh()
    if environment.rendezvous is None:
        raise InputError(f"MASTER_ADDR and MASTER_PORT are not set: {environment.how_to_meet()}")
    timeout = settings.runtime.timeout_s
    connect(device, timeout)
    if device.type == "cuda":
        gpu = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
        require_own(broadcast(gather(gpu)))
    topology = broadcast(topology)  # the leader's, where ranks have chips of several kinds
    return make_mesh(topology, environment.rank, device, timeout, shares_memory=settings.mesh.shares_memory)
