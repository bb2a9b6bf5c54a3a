"""`longvid plan --measure` beside real renders: time, time to the first frames, and memory, of models of several sizes.

python benchmarks/plan.py --out benchmarks/results/plan.json

Models are Wan models of random weights, made here. Each film is rendered on one rank and on two, a thread each. The
ranks measure a layer and the decoder, all at once, and predict, then render; this is repeated, in turn, and
medians are compared. Time is that of frames as they come, without the writing of a file; memory that of all tensors
alive at once on the leader, without what libraries take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longvid.doctor import cpu_facts, package_version
from longvid.engine import Engine
from longvid.launch.env import rank_of
from longvid.launch.local import run_local
from longvid.measured import measure_machine
from longvid.models.facts import find_model, sizes_of
from longvid.outlook import Film, options
from longvid.plan import make_plan
from longvid.script import Script, parse_script

PROMPT = "a large red circle moving left over a blue background"


@dataclass(frozen=True)
class Case:
    """A model (None: the embedded one) and a film of it."""

    name: str
    seconds: int
    size: tuple[int, int]
    steps: int
    width: int | None = None
    layers: int = 0
    vae: int = 32

    def make(self, folder: Path) -> str:
        """The model's name, or its directory."""
        if self.width is None:
            return "mini"
        path = folder / self.name
        pipe = diffusers.WanPipeline.from_pretrained(find_model("mini"))
        config = {**pipe.transformer.config, "num_layers": self.layers, "ffn_dim": 4 * self.width}
        config |= {"num_attention_heads": self.width // 64, "attention_head_dim": 64}
        vae = {**pipe.vae.config, "base_dim": self.vae}
        torch.manual_seed(0)
        pipe.register_modules(
            transformer=diffusers.WanTransformer3DModel.from_config(config),
            vae=diffusers.AutoencoderKLWan.from_config(vae),
        )
        pipe.save_pretrained(path)
        return str(path)

    @property
    def story(self) -> str:
        return f'size: [{self.size[0]}, {self.size[1]}]\nscenes:\n  - {{prompt: "{PROMPT}", for: {self.seconds}s}}\n'

    @property
    def overrides(self) -> list[str]:
        return [f"sampler.steps={self.steps}", "runtime.threads=1"]


CASES = (
    Case("mini", 10, (64, 64), 8),
    Case("width 384, 8 layers", 3, (128, 128), 3, 384, 8),
    Case("width 768, 6 layers, wide VAE", 3, (128, 128), 3, 768, 6, 64),
    Case("width 512, 12 layers, 192 x 192", 3, (192, 192), 3, 512, 12),
)


class LiveTensors(TorchDispatchMode):
    """Bytes of tensors made and still alive, and their peak."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        """`modules` are there already, and count."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        for module in modules:
            for parameter in module.parameters():
                self._see(parameter.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = weakref.finalize(storage, self._forget, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def rank(out: Path, model: str, case: Case, repeats: int) -> None:
    """One rank; the leader writes both sides. A film before the first, so that libraries are warm, counts memory."""
    engine = Engine.load(model, overrides=[*case.overrides, f"mesh.stage={len_of_mesh()}"])
    script = parse_script(case.story, "story.yaml")
    planned, measured, memory = [], [], memory_of(engine, script)
    for _ in range(repeats):
        planned.append(plan(engine, script))  # by all ranks at once, as they also render
        measured.append(render(engine, script))
    if engine.mesh.is_leader:
        out.write_text(json.dumps({"planned": planned, "measured": measured, "memory_mb": memory}))
    engine.leave()


def len_of_mesh() -> int:
    """Ranks that were started."""
    found = rank_of(os.environ)
    return found.world_size if found else 1


def memory_of(engine: Engine, script: Script) -> float:
    """The most that tensors take at once, 10^6 bytes."""
    stage: Any = engine._stage
    prompts: Any = getattr(engine, "_prompts", None)
    modules = [stage.dit, *([engine.vae, prompts.encoder] if engine.mesh.is_leader else [])]
    with LiveTensors(modules) as live:
        for _ in engine.stream(script):
            pass
    return live.peak / 1e6


def render(engine: Engine, script: Script) -> dict[str, float]:
    """Seconds until the first frames, and until the last."""
    start, first = time.perf_counter(), 0.0
    for _ in engine.stream(script):
        first = first or time.perf_counter() - start
    return {"seconds": time.perf_counter() - start, "first_s": first}


def plan(engine: Engine, script: Script) -> dict[str, float]:
    """What `longvid plan --measure` says of the same."""
    ranks, settings = engine.mesh.topology.num_ranks, engine.settings
    film = Film(make_plan(script, settings, engine.facts), settings, engine.facts, sizes_of(settings.model.path))
    best = options(film, measure_machine(film, ranks), ranks)[0]
    assert best.pace
    return {"seconds": best.seconds, "first_s": best.pace.first, "memory_mb": best.memory[0].total_mb}


def compare(case: Case, ranks: int, repeats: int, folder: Path, model: str) -> dict[str, Any]:
    """Medians of both sides."""
    out = folder / "rank.json"
    command = [sys.executable, "-P", __file__, "--rank", str(out), "--model", model, "--repeats", str(repeats)]
    code = run_local([*command, "--cases", str(CASES.index(case))], ranks)
    if code:
        sys.exit(code)
    runs = json.loads(out.read_text())

    def medians(rows: list[dict[str, float]]) -> dict[str, float]:
        return {key: statistics.median(row[key] for row in rows) for key in rows[0]}

    planned, measured = medians(runs["planned"]), {**medians(runs["measured"]), "memory_mb": runs["memory_mb"]}
    error = {key: planned[key] / measured[key] - 1 for key in measured}
    return {"case": case.name, "ranks": ranks, "planned": planned, "measured": measured, "error": error, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path)
    for name in ("--rank", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(Path(args.rank), args.model, CASES[args.cases[0]], args.repeats)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (CASES[index] for index in args.cases):
            model = case.make(Path(folder))
            for ranks in args.ranks:
                rows.append(compare(case, ranks, args.repeats, Path(folder), model))
                print(_line(rows[-1]), flush=True)
    machine = {key: cpu_facts()[key] for key in ("name", "cores")} | {"torch": package_version("torch")}
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "repeats": args.repeats, "rows": rows}, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['case']:34}{row['ranks']} ranks"]
    for key, unit in (("seconds", "s"), ("first_s", "s"), ("memory_mb", "MB")):
        planned, measured = row["planned"][key], row["measured"][key]
        cells.append(f"{key}: {measured:.2f} {unit} measured, {planned:.2f} planned ({row['error'][key]:+.0%})")
    return "; ".join(cells)


if __name__ == "__main__":
    main()
