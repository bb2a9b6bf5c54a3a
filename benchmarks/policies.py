"""Every policy of sparse attention beside dense attention, on the same films of the embedded model.

python benchmarks/policies.py --films 8 --frames 481 --out benchmarks/results/policies-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longvid.bench.policies import Case, as_text, measure_policies
from longvid.doctor import cpu_facts, package_version

COMMON = ["schedule=sequential", "sampler.steps=8"]
"""The whole clip at once: where attention is most of the work."""

CASES = (
    Case("adaspa", ("attention.policy=adaspa",), "HunyuanVideo 1.78x, 29.07 dB"),
    Case("tile", ("attention.policy=tile",), "1.5-2.25x of 7.4-7.8x"),
    Case("sta", ("attention.policy=sta", "attention.tile=[6,4,4]"), "HunyuanVideo 1.89x"),
    Case("radial", ("attention.policy=radial", "attention.tile=64"), ""),
    Case("grat", ("attention.policy=grat", "attention.group=[4,2,2]", "attention.pattern=neighbours"), ""),
    Case("svg2", ("attention.policy=svg2",), "HunyuanVideo 2.30x, 30.45 dB at density 0.25"),
    Case("svg_ear", ("attention.policy=svg_ear",), "HunyuanVideo 1.93x, 31.04 dB at density 0.22"),
    Case("window", ("attention.policy=rettention", "attention.refresh_every=1000", "attention.growth=0"), ""),
    Case("rettention", ("attention.policy=rettention",), "45 % of the latency, 3.1 % of the tokens"),
    Case("asa", ("attention.policy=asa",), "1.50x without distillation"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=8)
    parser.add_argument("--frames", type=int, default=481)
    parser.add_argument("--only", nargs="*", help="names of policies")
    parser.add_argument("--profile", help="a profile by `longvid tune`, for sparse_vdit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = list(CASES)
    if args.profile:
        overrides = ("attention.policy=sparse_vdit", f"attention.profile={args.profile}")
        cases.append(Case("sparse_vdit", overrides, "Wan2.1 1.58x, 22.59 dB"))
    cases = [case for case in cases if not args.only or case.name in args.only]
    result = measure_policies(
        cases, COMMON, films=args.films, frames=args.frames, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    result["machine"] = {"cpu": cpu_facts()["name"], "torch": package_version("torch")}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(as_text(result))


if __name__ == "__main__":
    main()
