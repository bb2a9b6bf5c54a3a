"""A rank for the tests of launching: units of work passed around a ring, under a watchdog.

Arguments: a folder, in which it writes its process id, and a number of units. The environment variable FAULT, such as
`1:raise`, says what one rank does in the middle. It ends like the command line does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from longvid.errors import InputError, Interrupted, LongvidError, RuntimeFailure
from longvid.launch.env import RankEnv, rank_of
from longvid.launch.local import end_with_supervisor
from longvid.launch.watch import Limits, Watch
from longvid.parallel.collectives import connect, disconnect
from longvid.parallel.comm import DistComm, Header

UNIT_S = 0.02
LIMITS = Limits(beat_s=0.25, lost_s=4.0, settle_s=1.0)


class Ring:
    """Work that needs everybody: a unit goes around."""

    def __init__(self, env: RankEnv, folder: Path, units: int) -> None:
        self.env, self.folder, self.units, self.unit = env, folder, units, 0
        self.comm: DistComm | None = None

    def status(self) -> str:
        return f"forward c{self.unit}"

    def abort(self, error: LongvidError) -> None:
        if self.comm:
            self.comm.abort(error)

    def run(self) -> None:
        with Watch(
            self.env,
            name=lambda rank: f"rank {rank} (stage {rank})",
            status=self.status,
            on_failure=self.abort,
            resume="go on with --resume",
            limits=LIMITS,
        ):
            self.fault("early")
            connect(torch.device("cpu"), 60.0)
            self.comm = DistComm(torch.device("cpu"), 60.0, lambda rank: f"rank {rank} (stage {rank})")
            for unit in range(self.units):
                self.unit = unit
                try:
                    self.pass_on()
                except RuntimeError as error:  # of a connection that is gone
                    raise error if isinstance(error, RuntimeFailure) else RuntimeFailure(str(error)) from error
                if self.unit == 10:
                    (self.folder / f"{os.getpid()}.running").touch()
                    self.fault("middle")
            self.comm.flush()

    def pass_on(self) -> None:
        assert self.comm
        env, header, value = self.env, Header(self.unit, 0), torch.zeros(4)
        incoming = self.comm.receive((env.rank - 1) % env.world_size, (4,), torch.float32)
        self.comm.send(header, value, (env.rank + 1) % env.world_size)
        time.sleep(UNIT_S)
        incoming.wait()

    def fault(self, when: str) -> None:
        rank, _, what = os.environ.get("FAULT", "").partition(":")
        if rank != str(self.env.rank) or what.endswith("early") != (when == "early"):
            return
        match what:
            case "failure" | "failure early":
                raise RuntimeFailure("the disk is full: film.mp4")
            case "input":
                raise InputError("line 3: no such thing")
            case "bug":
                raise KeyError("nowhere")
            case "stuck":
                raise RuntimeFailure("stuck")
            case "exit early":
                os._exit(7)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    env = rank_of(os.environ)
    assert env
    end_with_supervisor(env)
    try:
        if os.environ.get("FAULT") == "all:input":
            raise InputError("line 3: no such thing")
        Ring(env, Path(sys.argv[1]), int(sys.argv[2])).run()
        disconnect()
    except LongvidError as error:
        if "stuck" in str(error) and env.rank != 0:
            time.sleep(3600)
        kind = "" if isinstance(error, Interrupted) else "error: "
        print(f"longvid: {kind}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longvid: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    if code:
        os._exit(code)
