"""Messages of tensors on a device, by the way that they take there, between real processes over gloo.

The file is its own worker: with a folder it forks three ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.parallel.actions import LatentVersion
from longvid.parallel.collectives import connect, disconnect, meet, new_group
from longvid.parallel.comm import DistComm, Header
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decoding, Shares
from longvid.parallel.decoding_roles import DecodingOwners
from longvid.parallel.pipeline import rank_program
from longvid.parallel.rank_actions import Border, Halfway, Hidden, Overlap, PieceLatents, Seen, Send, Velocity
from longvid.parallel.rules import ChunkRules, QueueRules
from longvid.parallel.schedule import chunk_schedule, queue_schedule
from longvid.parallel.topology import Topology, talking_pairs

NUM_RANKS, COUNT, PATIENCE_S = 3, 40, 240.0
CPU = torch.device("cpu")
ON_DEVICE = Border | Halfway | Hidden | LatentVersion | Overlap | PieceLatents | Seen | Velocity


def payload(source: int, to: int, number: int) -> torch.Tensor:
    """What a message holds: now and then nothing."""
    rows = (number * 7 + source) % 5
    return torch.full((rows, 3), float(100 * source + 10 * to + number % 10), dtype=torch.bfloat16)


def talk(rank: int) -> list[str]:
    """Each rank sends the others many messages, and looks at theirs only after its own; what was wrong."""
    pairs = [(a, b) for a in range(NUM_RANKS) for b in range(NUM_RANKS) if a != b]
    own = DistComm(CPU, PATIENCE_S, by_device=True, pairs=pairs)
    others, wrong = [other for other in range(NUM_RANKS) if other != rank], []
    for is_sized in (True, False):
        incoming = {
            (other, n): own.receive(
                other, (0, 3) if is_sized else payload(other, rank, n).shape, torch.bfloat16, is_sized=is_sized
            )
            for n in range(COUNT)
            for other in others
        }
        for n in range(COUNT):
            for other in others:
                # Not contiguous, and gone when it is sent.
                wide = payload(rank, other, n).repeat(1, 2)
                own.send(Header(n, rank), wide[:, :3], other, window=COUNT, is_sized=is_sized)
        for (other, n), message in incoming.items():
            header, value = message.wait()
            if (header.chunk, header.step) != (n, other) or not torch.equal(value, payload(other, rank, n)):
                wrong.append(f"{other} to {rank}: message {n} was {header}, {value}")
        own.flush()
    return wrong


def limits(rank: int) -> list[str]:
    """A group's waits have the limit that it was made with."""
    group = new_group(range(NUM_RANKS), rank, CPU, PATIENCE_S)
    assert group
    found = group.handle._get_backend(CPU).options._timeout
    return [] if found == timedelta(seconds=PATIENCE_S) else [f"a group waits for {found}"]


def run_rank(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    connect(CPU, PATIENCE_S)
    (folder / f"{rank}.json").write_text(json.dumps({"talk": talk(rank), "limits": limits(rank)}))
    meet()
    disconnect()


def main(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(NUM_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


@pytest.fixture(scope="module")
def found(run_worker: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    code = run_worker(__file__, folder, PATIENCE_S)
    assert code == 0, (folder / "log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_tensors_on_a_device_come_whole_and_in_order_although_all_send_first(found: list[dict[str, Any]]) -> None:
    """Both ways at once, to two others, of the shape that the header says or that is known, some without elements."""
    assert [rank["talk"] for rank in found] == [[]] * NUM_RANKS


def test_groups_wait_no_longer_than_they_were_told(found: list[dict[str, Any]]) -> None:
    assert [rank["limits"] for rank in found] == [[]] * NUM_RANKS


TOPOLOGIES = st.builds(
    Topology, chunk=st.integers(1, 3), stage=st.integers(1, 3), guidance=st.integers(1, 2), seq=st.integers(1, 2)
)


@given(TOPOLOGIES, st.lists(st.integers(1, 12), min_size=1, max_size=3), st.booleans(), st.integers(1, 3))
@settings(max_examples=60)
def test_whoever_sends_a_tensor_on_a_device_is_among_the_pairs_that_are_connected(
    make_film: Any, topology: Topology, shots: list[int], decodes: bool, line: int
) -> None:
    plan, pairs = make_film(shots, 2, 1), set(talking_pairs(topology))
    owners, decoding = DecodingOwners(min(line, topology.chunk)), None
    if topology.chunk > 1:
        rules: Any = ChunkRules(3, 1, tokens=True)
        actions = list(chunk_schedule(plan.chunks, 3, rules))
    else:
        rules, owners = QueueRules(tokens=True), DecodingOwners()
        actions = list(queue_schedule(plan.chunks, 3, rules))
        if decodes and topology.stage > 1:
            shares = Shares((1 / topology.stage,) * topology.stage)
            decoding = StageDecoding(Decoding.of(shares, plan, rules, 3))
    said = set()
    for rank in range(topology.num_ranks):
        for action in rank_program(actions, topology, rank, decoding, owners):
            if isinstance(action, Send) and isinstance(action.message, ON_DEVICE):
                said.add((rank, action.to))
    assert said <= pairs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
