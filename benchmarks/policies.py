"""Policies of sparse attention, or of caches, beside the whole computation, on the same films of the embedded model.

python benchmarks/policies.py attention --films 2 --out benchmarks/results/attention-policies-cpu.json
python benchmarks/policies.py choosing
python benchmarks/policies.py cache --films 8 --out benchmarks/results/cache-policies-cpu.json
python benchmarks/policies.py preset --films 8 --out benchmarks/results/presets-cpu.json

Attention is looked at in whole clips, where it is most of the work, each policy in turn with dense attention; caches in
the queue, all in turn. `--out` is written after each policy (or group of `--together`), and with `--resume` what it has
is not measured again. `--table` prints it as the README has it, and measures nothing.
`choosing` is what the policies of attention take beside attention itself, in shares of dense attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from longvid.bench.choosing import as_text as choosing_as_text
from longvid.bench.choosing import measure_choosing
from longvid.bench.policies import DENSE, Case, as_markdown, as_text, measure_policies
from longvid.doctor import cpu_facts, package_version


def cache(name: str, *settings: str, published: str = "") -> Case:
    return Case(name, tuple(f"cache.{setting}" for setting in settings), published)


SEER = ("policy=taylorseer", "interval=5")
CACHES = (
    cache("taylorseer 2/1", "policy=taylorseer", "interval=2"),
    cache("taylorseer 3/1", "policy=taylorseer", "interval=3"),
    cache("taylorseer 5/0", *SEER, "order=0"),
    cache("taylorseer 5/1", *SEER, published="HunyuanVideo 4.65-5.0x"),
    cache("taylorseer 5/2", *SEER, "order=2", published="FLUX 4.99x at interval 6"),
    cache("taylorseer last_layer", *SEER, "level=last_layer"),
    cache("taylorseer module", *SEER, "level=module"),
    cache("cg_taylor", "policy=cg_taylor", published="Wan 4.14x"),
    cache("cg_taylor 0.1", "policy=cg_taylor", "gate=0.1"),
    cache("cg_taylor 0.03", "policy=cg_taylor", "gate=0.03"),
    cache("first_block", "policy=first_block"),
    cache("first_block 0.2", "policy=first_block", "threshold=0.2", "first_steps=3"),
    cache("delta_dit", "policy=delta_dit", published="1.6x at 20 steps"),
    cache("delta_dit 3", "policy=delta_dit", "interval=3"),
    cache("ras", "policy=ras", published="images 2.36-2.51x"),
    cache("ras 4", "policy=ras", "reset_every=4"),
)
EXACT, *PRESETS = (Case(name, (), preset=name) for name in ("exact", "balanced", "fast"))

POLICIES = (
    Case("adaspa", ("attention.policy=adaspa",), "HunyuanVideo 1.78x, 29.07 dB"),
    Case("tile", ("attention.policy=tile",), "1.5-2.25x of 7.4-7.8x"),
    Case(
        "sta",
        ("attention.policy=sta", "attention.tile=[6,4,4]"),
        "HunyuanVideo 1.89x",
        title="`sta`, cuboids of 6 × 4 × 4",
    ),
    Case(
        "sta 3 of 6x2x2",
        ("attention.policy=sta", "attention.tile=[6,2,2]", "attention.window=[3,2,2]"),
        title="`sta`, 3 × 2 × 2 cuboids of 6 × 2 × 2",
    ),
    Case("tile 16", ("attention.policy=tile", "attention.global_latents=16"), title="`tile`, 16 global latents"),
    Case("radial", ("attention.policy=radial", "attention.tile=64"), title="`radial`, tile 64"),
    Case(
        "grat",
        ("attention.policy=grat", "attention.group=[4,2,2]", "attention.pattern=neighbours"),
        title="`grat`, neighbours of 4 × 2 × 2",
    ),
    Case("svg2", ("attention.policy=svg2",), "HunyuanVideo 2.30x, 30.45 dB at density 0.25"),
    Case("svg_ear", ("attention.policy=svg_ear",), "HunyuanVideo 1.93x, 31.04 dB at density 0.22"),
    Case(
        "window",
        ("attention.policy=rettention", "attention.growth=1", "attention.residual=false"),
        title="`rettention` without its correction (a plain window, dense at the same steps)",
    ),
    Case(
        "rettention without R",
        ("attention.policy=rettention", "attention.residual=false"),
        title="`rettention`, `attention.residual=false`",
    ),
    Case("rettention", ("attention.policy=rettention",), "45 % of the latency, 3.1 % of the tokens"),
    Case("asa", ("attention.policy=asa",), "1.50x without distillation"),
)


def tuned(profile: str) -> Case:
    """What a profile is for."""
    policy = json.loads(Path(profile).read_text()).get("policy", "sparse_vdit")
    published = "Wan2.1 1.58x, 22.59 dB" if policy == "sparse_vdit" else ""
    overrides = (f"attention.policy={policy}", f"attention.profile={profile}")
    return Case(f"{policy} {Path(profile).stem}", overrides, published, title=f"`{policy}`, {Path(profile).stem}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["attention", "choosing", "cache", "preset"])
    parser.add_argument("--steps", type=int, help="of caches, which need steps to spare: 24; of attention: 8")
    parser.add_argument("--static", nargs="*", default=[], help="presets by `longvid train cache`")
    parser.add_argument("--films", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10, help="of choosing")
    parser.add_argument("--frames", type=int, default=961)
    parser.add_argument("--only", nargs="*", help="names of policies")
    parser.add_argument("--profile", nargs="*", default=[], help="profiles by `longvid tune`")
    parser.add_argument("--out", type=Path, help="JSON, written after each group")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    parser.add_argument("--together", type=int, help="policies that take turns; of attention: 1, of others: all")
    parser.add_argument("--table", action="store_true", help="print what --out has, for the README")
    args = parser.parse_args()
    if (args.resume or args.table) and not (args.out and (args.resume or args.out.is_file())):
        parser.error("--resume and --table need the file of --out")
    if args.table:
        print(as_markdown(json.loads(args.out.read_text())))
        return
    cases = list({"attention": POLICIES, "choosing": POLICIES, "cache": CACHES, "preset": PRESETS}[args.what])
    cases += [Case(f"static {Path(preset).stem}", (), preset=preset) for preset in args.static]
    cases += [tuned(profile) for profile in args.profile]
    cases = [case for case in cases if not args.only or case.name in args.only]
    if args.what == "choosing":
        found = measure_choosing(cases, frames=args.frames, repeats=args.repeats, say=say)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(choosing_as_text(found))
        return
    common = {
        "attention": ["schedule=sequential", f"sampler.steps={args.steps or 8}"],
        "cache": [f"sampler.steps={args.steps or 24}"],
        "preset": [],
    }[args.what]
    machine = {"cpu": cpu_facts()["name"], "torch": package_version("torch")}

    def keep(result: dict[str, Any]) -> None:
        if args.out:
            beside = args.out.with_suffix(".tmp")  # whatever ends this, the file is whole
            beside.write_text(json.dumps({**result, "machine": machine}, indent=1) + "\n")
            beside.replace(args.out)

    result = measure_policies(
        cases,
        common,
        films=args.films,
        frames=args.frames,
        reference=EXACT if args.what == "preset" else DENSE,
        together=args.together or (1 if args.what == "attention" else None),
        before=json.loads(args.out.read_text()) if args.resume and args.out.is_file() else None,
        keep=keep,
        say=say,
    )
    keep(result)
    print(as_text(result))


if __name__ == "__main__":
    main()
