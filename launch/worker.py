"""One rank of a render: joins the others, does its part, and ends with them."""

from __future__ import annotations

import os
from collections.abc import Callable

from longvid.engine import Engine
from longvid.errors import LongvidError
from longvid.launch.env import RankEnv
from longvid.launch.local import end_with_supervisor
from longvid.launch.watch import Watch


def run_rank(env: RankEnv, load: Callable[[], Engine], work: Callable[[Engine], None], resume: str = "") -> None:
    """Load an engine and do some work with it, as one of several ranks that all call this.

    Raises what the work raises, or RuntimeFailure when another rank fails; `resume` says in it how to go on.
    """
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

    with Watch(env, name=name, status=doing, on_failure=abort, resume=resume):
        engines.append(load())
        work(engines[0])
        engines[0].leave()
