"""Ranks that mpirun started meet over MPI: the leader says where its store is. All else goes through torch."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

from longvid.errors import InputError
from longvid.launch.env import RankEnv, Rendezvous
from longvid.launch.network import LOOPBACK, own_address, resolve
from longvid.launch.report import LEADER


def meet(env: RankEnv) -> RankEnv:
    """The same place with a rendezvous. Every rank calls it, and `leave` when its work is done.

    A process that ends between the two makes mpirun end all others. Raises InputError where mpi4py is not there, or
    belongs to another MPI than mpirun.
    """
    world = _mpi(env).COMM_WORLD
    if (world.rank, world.size) != (env.rank, env.world_size):
        raise InputError(
            f"mpirun started rank {env.rank} of {env.world_size}, but mpi4py sees rank {world.rank} of {world.size}: "
            "it uses another MPI; take the mpirun of that one, or set MPI4PY_LIBMPI"
        )
    machines = world.allgather(socket.gethostname())
    listener, place = None, None
    if env.rank == LEADER:
        others = [machine for machine in machines if machine != machines[LEADER]]
        address = (own_address(resolve(others[0])) or resolve(machines[LEADER])) if others else LOOPBACK
        server = socket.create_server((address, 0), family=_family(address), backlog=4 * env.world_size + 64)
        place = (address, server.getsockname()[1])
        listener = server.detach()
    host, port = world.bcast(place, root=LEADER)
    return replace(env, rendezvous=Rendezvous(host, port, listener=listener))


def leave(env: RankEnv) -> None:
    """This rank's work is done."""
    _mpi(env).Finalize()


def _mpi(env: RankEnv) -> Any:
    """MPI, which is entered by the first call."""
    try:
        import mpi4py

        # At the end of a rank that failed, this would wait for the others.
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed; no library of MPI
        raise InputError(
            f"mpirun started {env.world_size} ranks, which need mpi4py to meet ({error}): pip install 'longvid[mpi]', "
            f"or {env.how_to_meet()}"
        ) from None
    return MPI


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
