"""`longvid plan --measure` beside real renders: time, time to the first frames, and memory, of models of several sizes.

python benchmarks/plan.py --out benchmarks/results/plan.json

Models are the embedded one, and one of random weights of every other family, made here. Each film is rendered on
one rank and on two, a thread each. Before the first render, between them and after the last the ranks measure layers,
the decoder and messages, all at once, and predict; a render is compared with the predictions before and after it, and
the median of these errors counts, so that a machine that is slower for a while is so for both sides. Time is that of
frames as they come, without the writing of a file, from when all ranks are there. Memory is that of all tensors alive
at once, packed copies of weights among them, without what libraries take; of the ranks, that which the plan says worst.
The file has what was done so far after every row, and `--table` prints a file's errors as docs/plan.md has them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
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
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longvid.doctor import cpu_facts, package_version
from longvid.engine import Engine
from longvid.launch.env import rank_of
from longvid.launch.local import run_local
from longvid.measured import measure_machine
from longvid.meshes import Film, options
from longvid.models.facts import find_model, sizes_of
from longvid.parallel.collectives import gather, meet
from longvid.plan import make_plan
from longvid.script import Script, parse_script

PROMPT = "a large red circle moving left over a blue background"


@dataclass(frozen=True)
class Case:
    """A model (a family and its width; the embedded one without) and a film of it."""

    name: str
    seconds: int
    size: tuple[int, int]
    steps: int
    family: str = "mini"
    width: int = 0
    layers: int = 0

    def make(self, folder: Path) -> str:
        """The model's name, or its directory."""
        if self.family == "mini":
            return "mini"
        path = folder / f"{self.family} {self.width} {self.layers}"
        torch.manual_seed(0)
        makers = {"wan": self._wan, "cogvideox": self._cogvideox, "hunyuan": self._hunyuan, "ltx": self._ltx}
        makers[self.family]().save_pretrained(path)
        native = {"fps": 16, "width": self.size[0], "height": self.size[1]}
        (path / "longvid.json").write_text(json.dumps(native))
        return str(path)

    def _wan(self) -> Any:
        pipe = diffusers.WanPipeline.from_pretrained(find_model("mini"))
        config = {**pipe.transformer.config, "num_layers": self.layers, "ffn_dim": 4 * self.width}
        config |= {"num_attention_heads": self.width // 64, "attention_head_dim": 64}
        pipe.register_modules(transformer=diffusers.WanTransformer3DModel.from_config(config))
        return pipe

    def _cogvideox(self) -> Any:
        text = transformers.T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        return diffusers.CogVideoXPipeline(
            tokenizer=diffusers.WanPipeline.from_pretrained(find_model("mini")).tokenizer,
            text_encoder=transformers.T5EncoderModel(text),
            vae=diffusers.AutoencoderKLCogVideoX(
                latent_channels=8, block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=8
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
            transformer=diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=self.width // 64,
                attention_head_dim=64,
                in_channels=8,
                out_channels=8,
                text_embed_dim=64,
                num_layers=self.layers,
                sample_width=self.size[0] // 8,
                sample_height=self.size[1] // 8,
                sample_frames=49,
                max_text_seq_length=32,
            ),
        )

    def _hunyuan(self) -> Any:
        small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 512}
        tokenizer = diffusers.WanPipeline.from_pretrained(find_model("mini")).tokenizer
        return diffusers.HunyuanVideoPipeline(
            text_encoder=transformers.LlamaModel(
                transformers.LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, **small)
            ),
            tokenizer=tokenizer,
            text_encoder_2=transformers.CLIPTextModel(
                transformers.CLIPTextConfig(num_hidden_layers=2, eos_token_id=1, **small)
            ),
            tokenizer_2=tokenizer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=8, block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=8
            ),
            transformer=diffusers.HunyuanVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=self.width // 64,
                attention_head_dim=64,
                num_layers=self.layers // 2,
                num_single_layers=self.layers - self.layers // 2,
                num_refiner_layers=1,
                text_embed_dim=64,
                pooled_projection_dim=64,
                rope_axes_dim=(32, 16, 16),
            ),
        )

    def _ltx(self) -> Any:
        text = transformers.T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        return diffusers.LTXPipeline(
            tokenizer=diffusers.WanPipeline.from_pretrained(find_model("mini")).tokenizer,
            text_encoder=transformers.T5EncoderModel(text),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
            vae=diffusers.AutoencoderKLLTXVideo(
                latent_channels=16,
                block_out_channels=(32, 64, 64, 64),
                decoder_block_out_channels=(32, 64, 64, 64),
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 5,
            ),
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=16,
                out_channels=16,
                num_attention_heads=self.width // 64,
                attention_head_dim=64,
                cross_attention_dim=self.width,
                num_layers=self.layers,
                caption_channels=64,
            ),
        )

    @property
    def story(self) -> str:
        return f'size: [{self.size[0]}, {self.size[1]}]\nscenes:\n  - {{prompt: "{PROMPT}", for: {self.seconds}s}}\n'

    @property
    def overrides(self) -> list[str]:
        return [f"sampler.steps={self.steps}", "runtime.threads=1"]


CASES = (
    Case("mini, 10 s", 10, (64, 64), 8),
    Case("mini, 20 s, 4 steps", 20, (64, 64), 4),
    Case("mini, 10 s at 128 x 96", 10, (128, 96), 4),
    Case("Wan, width 384, 8 layers, 6 s", 6, (128, 128), 3, "wan", 384, 8),
    Case("CogVideoX, width 256, 6 layers, 3 s", 3, (96, 96), 4, "cogvideox", 256, 6),
    Case("HunyuanVideo, width 256, 6 layers, 3 s", 3, (80, 80), 4, "hunyuan", 256, 6),
    Case("LTX-Video, width 256, 6 layers, 6 s", 6, (128, 128), 4, "ltx", 256, 6),
)


class LiveTensors(TorchDispatchMode):
    """Bytes of this process's tensors, those that were there before among them, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        gc.collect()
        for value in gc.get_objects():
            if issubclass(type(value), torch.Tensor):  # an isinstance would wake lazy modules
                self._see(value.untyped_storage())

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
    memory: list[float] = [memory_of(engine, script)]
    if engine.mesh.topology.num_ranks > 1:
        memory = gather(*memory)
    measured, planned = [], [plan(engine, script)]  # by all ranks at once, as they also render
    for _ in range(repeats):
        measured.append(render(engine, script))
        planned.append(plan(engine, script))
    if engine.mesh.is_leader:
        out.write_text(json.dumps({"planned": planned, "measured": measured, "memory_mb": memory}))
    engine.leave()


def len_of_mesh() -> int:
    """Ranks that were started."""
    found = rank_of(os.environ)
    return found.world_size if found else 1


def memory_of(engine: Engine, script: Script) -> float:
    """The most that tensors take at once on this rank, 10^6 bytes."""
    with LiveTensors() as live:
        for _ in engine.stream(script):
            pass
    return live.peak / 1e6


def render(engine: Engine, script: Script) -> dict[str, float]:
    """Seconds until the first frames, and until the last, from when all ranks are there."""
    if engine.mesh.topology.num_ranks > 1:
        meet()
    start, first = time.perf_counter(), 0.0
    for _ in engine.stream(script):
        first = first or time.perf_counter() - start
    return {"seconds": time.perf_counter() - start, "first_s": first}


def plan(engine: Engine, script: Script) -> dict[str, Any]:
    """What `longvid plan --measure` says of the same; memory is that of each rank."""
    ranks, settings = engine.mesh.topology.num_ranks, engine.settings
    film = Film(make_plan(script, settings, engine.facts), settings, engine.facts, sizes_of(settings.model.path))
    best = options(film, measure_machine(film, ranks, engine.mesh.comm if ranks > 1 else None), ranks)[0]
    assert best.pace
    return {"seconds": best.seconds, "first_s": best.pace.first, "memory_mb": [stage.total_mb for stage in best.memory]}


def compare(case: Case, ranks: int, repeats: int, folder: Path, model: str) -> dict[str, Any]:
    """Medians of both sides."""
    out = folder / "rank.json"
    command = [sys.executable, "-P", __file__, "--rank", str(out), "--model", model, "--repeats", str(repeats)]
    code = run_local([*command, "--cases", str(CASES.index(case))], ranks)
    if code:
        sys.exit(code)
    runs = json.loads(out.read_text())
    held = runs["memory_mb"]
    worst = max(range(ranks), key=lambda at: abs(runs["planned"][0]["memory_mb"][at] / held[at] - 1))
    plans = [{**row, "memory_mb": row["memory_mb"][worst]} for row in runs["planned"]]
    planned = [{key: (before[key] + after[key]) / 2 for key in before} for before, after in itertools.pairwise(plans)]
    measured = [{**row, "memory_mb": held[worst]} for row in runs["measured"]]
    ratios = [{key: ours[key] / real[key] - 1 for key in real} for ours, real in zip(planned, measured, strict=True)]
    sides = {"planned": medians(planned), "measured": medians(measured), "error": medians(ratios)}
    return {"case": case.name, "ranks": ranks, **sides, "runs": runs}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each key."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file's errors as a table")
    for name in ("--rank", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(Path(args.rank), args.model, CASES[args.cases[0]], args.repeats)
        return
    if args.table:
        print(table(json.loads(args.table.read_text())["rows"]))
        return
    machine = {key: cpu_facts()[key] for key in ("name", "cores")} | {"torch": package_version("torch")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (CASES[index] for index in args.cases):
            model = case.make(Path(folder))
            for ranks in args.ranks:
                rows.append(compare(case, ranks, args.repeats, Path(folder), model))
                print(_line(rows[-1]), flush=True)
                if args.out:  # what is done so far, for whoever ends this early
                    found = {"machine": machine, "repeats": args.repeats, "rows": rows}
                    args.out.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """How far plans were off, in Markdown."""
    kinds = ("seconds", "first_s", "memory_mb")
    lines = ["| film | ranks | time | first frames | memory |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{100 * row['error'][kind]:+.0f} %" for kind in kinds)
        lines.append(f"| {row['case']} | {row['ranks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['case']:38}{row['ranks']} ranks"]
    for key, unit in (("seconds", "s"), ("first_s", "s"), ("memory_mb", "MB")):
        planned, measured = row["planned"][key], row["measured"][key]
        cells.append(f"{key}: {measured:.2f} {unit} measured, {planned:.2f} planned ({row['error'][key]:+.0%})")
    return "; ".join(cells)


if __name__ == "__main__":
    main()
