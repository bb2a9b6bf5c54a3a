"""Check a schedule before it runs: a simulation that derives anew what every action must find, and a picture.

Nothing is shared with schedule.py but the Actions and the rules. The simulation (`verify_queue.py`, `verify_chunks.py`)
keeps the values that are live and how far each chunk has come. It refuses a read of a value that is not there or not
the right one; work done twice, out of order or never; and a value that outlives its last reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longvid.parallel.actions import Action, Finish, Forecast, Forward
from longvid.parallel.decoding import Decode, DecodeAction
from longvid.parallel.findings import Report, ScheduleError
from longvid.parallel.rules import ChunkRules, Rules
from longvid.parallel.verify_chunks import ChunkSimulation
from longvid.parallel.verify_queue import QueueSimulation
from longvid.plan import Chunk


def simulate(actions: Iterable[Action], chunks: Sequence[Chunk], steps: int, rules: Rules, first: int = 0) -> Report:
    """Walk through the actions in O(chunks in flight) memory. Raises ScheduleError at the first one that is wrong.

    The chunks before `first` are finished; in a chunk schedule there are none.
    """
    simulation: QueueSimulation | ChunkSimulation
    if isinstance(rules, ChunkRules):
        simulation = ChunkSimulation(chunks, steps, rules)
    else:
        simulation = QueueSimulation(chunks, steps, rules, first)
    action: Action | str = "empty schedule"
    try:
        for action in actions:
            simulation.apply(action)
        action = f"end, after {action}"
        simulation.close()
    except ScheduleError as error:
        raise ScheduleError(f"{str(action).strip()}: {error}") from None
    return simulation.report()


def grid(actions: Iterable[Action | DecodeAction]) -> str:
    """A picture of rounds by chunks: the step that each chunk takes, ~ if it is forecast, and which chunks finish.

    Where stages decode, which latents in that round, each with the stage behind a slash.
    """
    steps: dict[int, dict[int, str]] = {}
    finished: dict[int, list[str]] = {}
    decoded: dict[int, list[str]] = {}
    last = -1
    for action in actions:
        last = last if isinstance(action, DecodeAction) else action.round
        match action:
            case Decode(piece=piece):
                decoded.setdefault(last, []).append(f"{piece}/{piece.stage}")
            case Forward(round=n, chunk=i, step=k):
                steps.setdefault(n, {})[i] = str(k)
            case Forecast(round=n, chunk=i, step=k):
                steps.setdefault(n, {})[i] = f"~{k}"
            case Finish(round=n, latents=latents):
                finished.setdefault(n, []).append(f"c{latents.chunk}")
    num_chunks = 1 + max((i for row in steps.values() for i in row), default=-1)
    width = max(4, len(str(num_chunks)) + 2)
    lines = ["round" + "".join(f"{f'c{i}':>{width}}" for i in range(num_chunks))]
    for n, row in steps.items():
        cells = "".join(f"{row.get(i, '.'):>{width}}" for i in range(num_chunks))
        ends = f"   finish {' '.join(finished[n])}" if n in finished else ""
        made = f"   decode {' '.join(decoded[n])}" if n in decoded else ""
        lines.append(f"{n:>5}{cells}{ends}{made}")
    return "\n".join(lines)
