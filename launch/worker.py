"""One rank of a render: joins the others, does its part, and ends with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from longvid.engine import Engine
from longvid.errors import LongvidError, Preempted
from longvid.launch import mpi
from longvid.launch.env import INTERFACE, RankEnv
from longvid.launch.local import end_with_supervisor, say
from longvid.launch.network import interface_towards, require_interface
from longvid.launch.watch import Watch
from longvid.preemption import Preemption


def run_rank(
    env: RankEnv,
    load: Callable[[], Engine],
    work: Callable[[Engine], None],
    resume: str = "",
    preemption: Preemption | None = None,
    say: Callable[[str], None] = say,
) -> None:
    """Load an engine and do some work with it, as one of several ranks that all call this.

    Raises what the work raises, or RuntimeFailure when another rank fails; `resume` says in it how to go on, and `say`
    tells the user where the leader cannot raise. Where `preemption` is given, SIGTERM on any rank asks the leader for
    it, who has a handler of its own.
    """
    meets_over_mpi = env.rendezvous is None
    env = join(env)
    os.environ.update(env.variables())
    end_with_supervisor(env)
    engines: list[Engine] = []

    def name(rank: int) -> str:
        return engines[0].describe(rank) if engines else f"rank {rank}"

    def doing() -> str:
        return engines[0].doing() if engines else "loading"

    def abort(error: LongvidError) -> None:
        for engine in engines:
            engine.abort(error)

    try:
        with Watch(env, name=name, status=doing, on_failure=abort, resume=resume, preemption=preemption, say=say):
            engines.append(load())
            work(engines[0])
            engines[0].leave()
    except Preempted:
        if meets_over_mpi:
            mpi.leave(env)
        raise
    if meets_over_mpi:
        mpi.leave(env)


def join(env: RankEnv) -> RankEnv:
    """The same place with what the launcher left open: where the ranks meet, and over which network interface.

    Raises InputError for an interface that is not there.
    """
    if env.rendezvous is None:
        env = mpi.meet(env)
    assert env.rendezvous is not None
    if env.interface:
        require_interface(INTERFACE, env.interface)
        return env
    return replace(env, interface=interface_towards(env.rendezvous.host, is_one_machine=env.is_one_machine))
