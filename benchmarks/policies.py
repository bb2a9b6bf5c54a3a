"""Policies of sparse attention, or of caches, beside the whole computation, on the same films of the embedded model.

python benchmarks/policies.py attention --films 4 --out benchmarks/results/attention-policies-cpu.json
python benchmarks/policies.py cache --films 8 --out benchmarks/results/cache-policies-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longvid.bench.policies import Case, as_text, measure_policies
from longvid.doctor import cpu_facts, package_version

ATTENTION = ["schedule=sequential", "sampler.steps=8"]
"""The whole clip at once: where attention is most of the work."""

CACHE = ["sampler.steps=24"]
"""The queue, with steps to spare."""

CACHES = tuple(
    Case(
        f"taylorseer {interval}/{order}",
        ("cache.policy=taylorseer", f"cache.interval={interval}", f"cache.order={order}"),
        "HunyuanVideo 4.65-5.0x" if (interval, order) == (5, 1) else "",
    )
    for interval, order in ((2, 1), (3, 1), (4, 1), (5, 0), (5, 1), (5, 2))
)

POLICIES = (
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
    parser.add_argument("what", choices=["attention", "cache"])
    parser.add_argument("--films", type=int, default=4)
    parser.add_argument("--frames", type=int, default=961)
    parser.add_argument("--only", nargs="*", help="names of policies")
    parser.add_argument("--profile", help="a profile by `longvid tune`, for sparse_vdit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = list(POLICIES if args.what == "attention" else CACHES)
    if args.profile:
        overrides = ("attention.policy=sparse_vdit", f"attention.profile={args.profile}")
        cases.append(Case("sparse_vdit", overrides, "Wan2.1 1.58x, 22.59 dB"))
    cases = [case for case in cases if not args.only or case.name in args.only]
    common = ATTENTION if args.what == "attention" else CACHE
    result = measure_policies(
        cases, common, films=args.films, frames=args.frames, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    result["machine"] = {"cpu": cpu_facts()["name"], "torch": package_version("torch")}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(as_text(result))


if __name__ == "__main__":
    main()
