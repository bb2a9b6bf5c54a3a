"""Two hosts on one machine: network namespaces with an address each, torchrun across them, and a link that is cut.

Needs Linux, root and iproute2. Prints one JSON object:
python benchmarks/two_hosts.py --seconds 20 --out benchmarks/results/two-hosts.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from longvid.launch.watch import Limits

STORY = 'scenes:\n  - {{prompt: "a large red circle moving left over a blue background", for: {seconds}s}}\n'
SETTINGS = ["runtime.threads=1", "runtime.checkpoint_s=0"]
ADDRESSES = ("10.231.7.1", "10.231.7.2")
PORT = 29655
START_S, END_S = 300.0, 60.0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two network namespaces, joined by a pair of virtual Ethernet devices."""

    def __init__(self) -> None:
        self.names = [f"longvid{os.getpid()}{letter}" for letter in "ab"]
        self.devices = [f"lv{os.getpid()}{letter}" for letter in "ab"]  # at most 15 letters

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
            for name, device, address in zip(self.names, self.devices, ADDRESSES, strict=True):
                ip("link", "set", device, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", device)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:  # their devices go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "up")


def arguments(story: Path, film: Path, *options: str) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["-m", "longvid", "render", str(story), "-o", str(film), *sets, *options]


def torchrun(hosts: Hosts, number: int, story: Path, film: Path, *options: str) -> subprocess.Popen[str]:
    """A host's torchrun, with one rank. What its rank says goes to FILM.NUMBER.log."""
    agent = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    agent += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    command = ["ip", "netns", "exec", hosts.names[number], sys.executable, "-P", "-m", "torch.distributed.run", *agent]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    log = film.with_name(f"{film.name}.{number}.log").open("w")
    return subprocess.Popen(
        [*command, *arguments(story, film, *options)], env=environment, stdout=log, stderr=log, start_new_session=True
    )


@contextlib.contextmanager
def on_both(hosts: Hosts, story: Path, film: Path, *options: str) -> Iterator[list[subprocess.Popen[str]]]:
    agents: list[subprocess.Popen[str]] = []
    try:
        agents.extend(torchrun(hosts, number, story, film, *options) for number in (0, 1))
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()


def wait_for(path: Path, agents: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + START_S
    while not path.exists():
        if time.monotonic() > until or any(agent.poll() is not None for agent in agents):
            raise SystemExit(f"{path} did not come: {said(path.parents[2] / 'film.mp4', 0)}")
        time.sleep(0.01)


def said(film: Path, number: int) -> list[str]:
    """What a host's rank said of its end."""
    lines = film.with_name(f"{film.name}.{number}.log").read_text().splitlines()
    return [line for line in lines if line.startswith("longvid: ")]


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


def render_on_both(hosts: Hosts, story: Path, film: Path, *options: str) -> str:
    with on_both(hosts, story, film, *options) as agents:
        codes = [agent.wait() for agent in agents]
    if any(codes):
        raise SystemExit(f"torchrun ended with {codes}: {film.with_name(f'{film.name}.0.log').read_text()}")
    return digest(film)


def cut_and_resume(hosts: Hosts, story: Path, film: Path) -> dict[str, object]:
    """Cut the link in the middle of a render; see both sides end, mend it, and go on."""
    with on_both(hosts, story, film) as agents:
        wait_for(film.with_name(f"{film.name}.longvid") / "state/manifest.json", agents)
        hosts.cut()
        began, ended = time.monotonic(), [0.0, 0.0]
        while not all(ended):
            for number in (0, 1):
                # The rank tells before it ends; torchrun would wait for the other host's.
                if not ended[number] and said(film, number):
                    ended[number] = time.monotonic() - began
            if time.monotonic() - began > END_S:
                raise SystemExit(f"a side has not noticed in {END_S:g} s: {[said(film, number) for number in (0, 1)]}")
            time.sleep(0.05)
    messages = [said(film, number)[0] for number in (0, 1)]
    hosts.mend()
    return {
        "noticed_s": [round(seconds, 1) for seconds in ended],
        "messages": messages,
        "resumed": render_on_both(hosts, story, film, "--resume"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="of film")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("two_hosts.py makes network namespaces: it needs root, and iproute2's `ip`")
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        story = Path(folder) / "story.yaml"
        story.write_text(STORY.format(seconds=args.seconds))
        one = Path(folder) / "one.mp4"
        command = [sys.executable, "-P", *arguments(story, one, "--ranks", "2")]
        subprocess.run(command, check=True, capture_output=True)
        expected = digest(one)
        two = render_on_both(hosts, story, Path(folder) / "two.mp4")
        cut = cut_and_resume(hosts, story, Path(folder) / "film.mp4")
    result = {
        "film_s": args.seconds,
        "two_hosts_same": two == expected,
        "cut_resumed_same": cut.pop("resumed") == expected,
        "lost_after_s": Limits().lost_s,
        **cut,
    }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    sys.exit(not (result["two_hosts_same"] and result["cut_resumed_same"]))


if __name__ == "__main__":
    main()
