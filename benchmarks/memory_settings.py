"""What settings of memory save and cost: peak of resident memory, time, and error, each in a process of its own.

python benchmarks/memory_settings.py --out benchmarks/results/memory-settings-cpu.json

The model is random, of Wan's layout: 16 layers 768 wide (0.6 GB in fp32), and a text encoder of 0.3 GB. Error is that
of the film's latents, relative to those without the setting. The VAE that decodes is of the size of Wan 2.1's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from longvid.doctor import cpu_facts, package_version
from longvid.engine import Engine
from longvid.models.wan_vae import WanStreamDecoder
from longvid.script import parse_script

STORY = 'seed: 3\nsize: [128, 128]\nscenes:\n  - {prompt: "a red circle moving left", for: 13f}\n'
FIXED = ["runtime.threads=1", "sampler.steps=3", "queue.chunk_latents=4"]
FILMS = {
    "as it is": [],
    "text_encoder=free, new prompts": ["memory.text_encoder=free"],
    "text_encoder=free, known prompts": ["memory.text_encoder=free"],
    "offload=disk": ["memory.text_encoder=free", "memory.offload=disk"],
    "quantize=int8": ["memory.text_encoder=free", "memory.quantize=int8"],
    "quantize=fp8": ["memory.text_encoder=free", "memory.quantize=fp8"],
    "quantize=w8a8": ["memory.text_encoder=free", "memory.quantize=w8a8"],
}
ROWS = (0, 8, 4)


def make_model(folder: Path) -> None:
    """Save a random checkpoint."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = transformers.UMT5Config(vocab_size=32000, d_model=1024, d_kv=64, d_ff=2048, num_layers=5, num_heads=16)
    diffusers.WanPipeline(
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        transformers.UMT5EncoderModel(text),
        diffusers.AutoencoderKLWan(base_dim=8),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=64, ffn_dim=3072, num_layers=16, text_dim=1024
        ),
    ).save_pretrained(folder)


def film(model: Path, overrides: list[str], latents: Path) -> dict[str, Any]:
    """Denoise a film, and save its latents."""
    engine = Engine.load(model, overrides=[*FIXED, *overrides])
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    start = time.monotonic()
    made = torch.cat([finished.latents for finished in engine.denoise(plan)], dim=1)
    seconds = time.monotonic() - start
    torch.save(made, latents)
    return {"seconds": seconds, "peak_mb": peak() / 1e6}


def decode(rows: int) -> dict[str, Any]:
    """Decode two latents of 128 x 208 pixels with the VAE."""
    torch.set_num_threads(1)
    decoder = WanStreamDecoder(AutoencoderKLWan())
    latents = torch.randn(16, 2, 16, 26, generator=torch.Generator().manual_seed(0))
    if rows:
        decoder.split_rows(rows)
    before, start = peak(), time.monotonic()
    decoder.push(latents)
    state = sum(value.nbytes for value in decoder.state().values())
    return {"seconds": time.monotonic() - start, "peak_mb": (peak() - before) / 1e6, "state_mb": state / 1e6}


def peak() -> int:
    """Bytes of resident memory, at the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, first, *rest = args.one
        if kind == "film":
            print(json.dumps(film(Path(first), json.loads(rest[0]), Path(rest[1]))))
        else:
            print(json.dumps(decode(int(first))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder) / "model", f"memory.prompt_cache={folder}/prompts"
        make_model(model)
        exact: torch.Tensor | None = None
        for name, overrides in FILMS.items():
            made = Path(folder) / "latents.pt"
            found = in_a_process("--one", "film", str(model), json.dumps([*overrides, cache]), str(made))
            latents = torch.load(made, weights_only=True)
            exact = latents if exact is None else exact
            rows.append({"setting": name, **found, "error": float((latents - exact).norm() / exact.norm())})
            print(f"{name:34} {found['peak_mb']:7.0f} MB {found['seconds']:6.1f} s  error {rows[-1]['error']:.4f}")
        for count in ROWS:
            found = in_a_process("--one", "vae", str(count))
            rows.append({"setting": f"vae_rows={count}", **found})
            above = found["peak_mb"] - found["state_mb"]
            print(
                f"vae_rows={count}  {above:7.0f} MB above a state of {found['state_mb']:.0f}, {found['seconds']:.1f} s"
            )
    machine = {"cpu": cpu_facts()["name"], "torch": package_version("torch"), "torchao": package_version("torchao")}
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "settings": FIXED, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
