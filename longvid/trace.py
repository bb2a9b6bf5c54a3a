"""Where the time of a render goes: every action of every rank, as a trace for Perfetto and as a summary.

The format is Chrome's trace events (JSON): one process a rank, with a thread for each kind of work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longvid.parallel.actions import Encode, Forecast, Forward, Fuse, Gate, Step
from longvid.parallel.decoding import Decode
from longvid.parallel.rank_actions import HandOn, Look, RankAction, Receive, Send, name_of

KINDS = ("compute", "receive", "send", "decode", "write")


@dataclass
class Trace:
    """What one rank did: spans of (kind, name, start, end) in nanoseconds of the machine's monotonic clock."""

    rank: int
    name: str
    spans: list[tuple[str, str, int, int]] = field(default_factory=list)

    def on_action(self, action: RankAction, start: int, end: int) -> None:
        """The executor's callback. Bookkeeping (drops, admissions) is left out."""
        match action:
            case Encode() | Look() | Gate() | Forward() | Forecast() | Fuse() | Step():
                self.add("compute", name_of(action), start, end)
            case Receive():
                self.add("receive", name_of(action), start, end)
            case Decode() | HandOn():
                self.add("decode", name_of(action), start, end)
            case Send():
                self.add("send", name_of(action), start, end)

    def add(self, kind: str, name: str, start: int, end: int) -> None:
        """Add a span of any kind."""
        self.spans.append((kind, name, start, end))

    def seconds(self) -> dict[str, float]:
        """Time by kind of work."""
        total: Counter[str] = Counter()
        for kind, _, start, end in self.spans:
            total[kind] += end - start
        return {kind: total[kind] / 1e9 for kind in KINDS}


def summary(traces: Sequence[Trace]) -> dict[str, Any]:
    """Shares of the time from the first span's start to the last one's end, over all ranks."""
    start = min(span[2] for trace in traces for span in trace.spans)
    end = max(span[3] for trace in traces for span in trace.spans)
    wall = (end - start) / 1e9
    seconds = [trace.seconds() for trace in traces]
    idle = [wall - sum(rank[kind] for kind in ("compute", "decode", "write")) for rank in seconds]
    total = wall * len(traces)
    return {
        "wall_s": wall,
        "bubble": sum(idle) / total,
        "comm_wait_fraction": sum(rank["receive"] + rank["send"] for rank in seconds) / total,
        "ranks": [
            {"rank": trace.rank, "name": trace.name, **rank, "idle": rest}
            for trace, rank, rest in zip(traces, seconds, idle, strict=True)
        ],
    }


def write_trace(path: Path, traces: Sequence[Trace], facts: dict[str, Any]) -> None:
    """All ranks' spans as one file for https://ui.perfetto.dev; `facts` goes with them as `otherData`."""
    start = min((span[2] for trace in traces for span in trace.spans), default=0)
    events: list[dict[str, Any]] = []
    for trace in traces:
        events.append({"ph": "M", "name": "process_name", "pid": trace.rank, "args": {"name": trace.name}})
        for index, kind in enumerate(KINDS):
            thread = {"pid": trace.rank, "tid": index}
            events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": kind}})
        for kind, name, begin, end in trace.spans:
            place = {"pid": trace.rank, "tid": KINDS.index(kind)}
            events.append(
                {"ph": "X", "name": name, "cat": kind, "ts": (begin - start) / 1e3, "dur": (end - begin) / 1e3, **place}
            )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}))


def summary_text(found: dict[str, Any]) -> str:
    """The summary for people, with the bubble that was predicted if there is one."""
    kinds = (*KINDS, "idle")
    lines = [f"{'':28}" + "".join(f"{kind:>10}" for kind in kinds)]
    lines += [f"{rank['name']:28}" + "".join(f"{rank[kind]:9.2f}s" for kind in kinds) for rank in found["ranks"]]
    predicted = found.get("predicted_bubble")
    forecast = f", {predicted * 100:.1f} % predicted" if predicted is not None else ""
    lines.append(f"bubble {found['bubble'] * 100:.1f} % of {found['wall_s']:.2f} s{forecast}")
    return "\n".join(lines)
