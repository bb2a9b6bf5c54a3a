"""What sparse attention takes besides its tiles, on the queries, keys and values of a film of the embedded model."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from longvid.bench.policies import Case, Say
from longvid.engine import Engine
from longvid.kernels.dense import attend_lse
from longvid.kernels.dispatch import sparse_attention
from longvid.kernels.layout import BlockLayout
from longvid.script import Duration, Scene, Script
from longvid.settings import load_settings
from longvid.sparsity.listener import Listener
from longvid.sparsity.make import make_policy
from longvid.sparsity.policy import Call, Memory, Policy
from longvid.sparsity.settings import Dense

ResultT = TypeVar("ResultT")
Inputs = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""
Recorded = tuple[Inputs, Call]
STEPS = 5


class _Times:
    """The fewest seconds that each thing took."""

    def __init__(self) -> None:
        self.least: dict[tuple[int, str], float] = defaultdict(lambda: float("inf"))

    def of(self, step: int, name: str, work: Callable[[], ResultT]) -> ResultT:
        start = time.perf_counter()
        result = work()
        self.least[step, name] = min(self.least[step, name], time.perf_counter() - start)
        return result


def measure_choosing(cases: Sequence[Case], *, frames: int, repeats: int, say: Say) -> dict[str, Any]:
    """Shares of our own dense attention's time, of one layer in a film of one clip and `STEPS` steps.

    `kernel` is attention to the tiles, `choosing` everything before it and behind it, both as medians over the sparse
    steps; `dearest` is the most that one step takes besides attention: where AdaSpa searches, and where Sparse VideoGen
    2 finds its first clusters. `torch` is how many times as long torch's dense attention takes. Minima over repeats, in
    which each policy takes turns with both.
    """
    calls = _record(frames)
    rows = []
    for case in cases:
        with torch.inference_mode():
            rows.append(_measure(case, calls, repeats))
        say(case.name)
    tokens = calls[0][1].tokens
    return {"frames": frames, "queries": tokens.num_queries, "keys": tokens.num_keys, "policies": rows}


def _record(frames: int) -> list[Recorded]:
    """The inputs of one layer at every step of a dense film."""
    common = ["schedule=sequential", f"sampler.steps={STEPS}", "attention.policy=tile", "attention.crossover=always"]
    engine = Engine.load("mini", overrides=common)
    assert engine.attention is not None
    layer, calls = engine.facts.num_layers // 2, list[Recorded]()

    def keep(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> None:
        if call.layer == layer:
            calls.append(((q_BLHD.clone(), k_BTHD.clone(), v_BTHD.clone()), call))

    engine.attention.policy = Listener(keep)
    scene = Scene("a large red circle moving left", Duration(frames, "f"))
    for _ in engine.denoise(engine.plan(Script((scene,)))):
        pass
    return calls


def _measure(case: Case, calls: Sequence[Recorded], repeats: int) -> dict[str, Any]:
    times = _Times()
    densities: dict[int, float] = {}
    for _ in range(repeats):
        policy: Policy = _policy(case)
        memory: Memory = {}
        for step, (inputs, recorded) in enumerate(calls):
            found = _step(policy, inputs, replace(recorded, memory=memory), times)
            if found is not None and step not in densities:
                densities[step] = found.density()
    steps = range(len(calls))
    dense, torch_s = (statistics.mean(times.least[step, name] for step in steps) for name in ("dense", "torch"))
    besides = [times.least[step, "layout"] + times.least[step, "finish"] for step in steps]
    sparse = list(densities)
    return {
        "name": case.name,
        "dense_s": dense,
        "torch": torch_s / dense,
        "density": statistics.median(densities.values()),
        "kernel": statistics.median(times.least[step, "kernel"] for step in sparse) / dense,
        "choosing": statistics.median(besides[step] for step in sparse) / dense,
        "dearest": max(besides) / dense,
    }


def _step(policy: Policy, inputs: Inputs, call: Call, times: _Times) -> BlockLayout | None:
    step = call.step
    q, k, v = (x.transpose(1, 2) for x in inputs)
    partial = times.of(step, "dense", lambda: attend_lse(*inputs))
    times.of(step, "torch", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    layout = times.of(step, "layout", lambda: policy.layout(*inputs, call))
    if layout is not None:
        partial = times.of(step, "kernel", lambda: sparse_attention(*inputs, layout))
    times.of(step, "finish", lambda: policy.finish(*inputs, partial, layout, call))
    return layout


def _policy(case: Case) -> Policy:
    settings = load_settings(overrides=case.overrides).attention
    assert not isinstance(settings, Dense)
    return make_policy(settings)


def as_text(result: dict[str, Any]) -> str:
    """The table for people, in percent of our own dense attention."""
    lines = [
        f"{result['queries']} x {result['keys']} tokens, shares of dense attention",
        f"{'':24}{'density':>9}{'kernel':>9}{'choosing':>10}{'dearest':>9}{'torch':>8}",
    ]
    for row in result["policies"]:
        shares = f"{row['kernel']:9.1%}{row['choosing']:10.1%}{row['dearest']:9.1%}"
        lines.append(f"{row['name']:24}{row['density']:9.3f}{shares}{row['torch']:7.2f}x")
    return "\n".join(lines)
