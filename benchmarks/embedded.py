"""Measure the embedded model (or another of the drawn world): the table of its model card.

python benchmarks/embedded.py --out benchmarks/results/embedded.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longvid.bench.embedded import as_markdown, measure_model
from longvid.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--films", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engine = Engine.load(args.model, overrides=args.overrides)
    result = measure_model(
        engine,
        clips=args.clips,
        held_out=args.held_out,
        films=args.films,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
