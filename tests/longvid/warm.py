"""A process that has loaded what a render needs, and forks a child for each program: a rank without seconds of imports.

`test_ranks.py` starts it and writes it a line of JSON for every run: programs that run side by side, each with its
`environment`, its `arguments` (of the command line, or after the path of a program in Python) and a file for what it
prints. It answers with the list of their process ids, and at their end with the list of their exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

from longvid.cli import main


def load() -> None:
    """Import what a rank imports. It computes nothing, for torch's threads would not be in the children."""
    import av  # noqa: F401
    import diffusers
    import transformers

    import longvid.engine
    import longvid.launch.worker
    import longvid.progress  # noqa: F401

    names = ("AutoTokenizer", "T5Tokenizer", "UMT5EncoderModel")
    assert all(getattr(transformers, name) for name in names) and diffusers.WanPipeline


def run(program: dict[str, Any]) -> None:
    """Become the program. It ends this process as it ends its own."""
    os.environ.update(program["environment"])
    output = os.open(program["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    first, *others = program["arguments"]
    if first.endswith(".py"):
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")
        sys.exit()
    sys.argv = ["longvid", first, *others]
    main()


def serve() -> None:
    """Fork the children of every run, and wait for their ends."""
    for line in sys.stdin:
        pids = []
        for program in json.loads(line):
            pid = os.fork()
            if pid == 0:
                run(program)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    load()
    serve()
