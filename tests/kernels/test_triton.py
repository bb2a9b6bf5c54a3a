"""What is left of the Triton kernels without a GPU: their launchers' tables, and the kernels in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels.layout import Blocks, even_blocks, make_layout, one_group

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_follow_their_oracles_in_the_interpreter():
    file = Path(__file__).with_name("interpret_triton.py")
    command = [sys.executable, "-P", "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    root = file.parents[2]
    command += ["-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.sampled_from([16, 64, 128]), st.integers(0, 9))
def test_query_tiles_cover_every_query_once_and_begin_with_the_longest_rows(lengths, block_m, seed):
    from longvid.kernels.block_sparse import query_tiles

    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    blocks = Blocks(edges[None])
    mask = torch.rand(2, len(lengths), 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = make_layout(blocks, even_blocks(50, 10), mask, one_group(1))
    rows, firsts = query_tiles(layout, sum(lengths), block_m)
    for group in range(2):
        seen, counts = [], []
        for row, first in zip(rows[group].tolist(), firsts[group].tolist(), strict=True):
            if row >= 0:
                assert first >= edges[row]
                seen += range(first, min(first + block_m, int(edges[row + 1])))
                counts.append(int(mask[group, row].sum()))
        assert sorted(seen) == list(range(sum(lengths)))
        assert counts == sorted(counts, reverse=True)


@given(st.integers(1, 500), st.sampled_from([16, 64, 100, 128, 200]), st.sampled_from([64, 128]))
def test_blocks_of_a_known_size_need_no_spare_tiles(num_tokens, size, block_m):
    from longvid.kernels.block_sparse import query_tiles

    blocks = even_blocks(num_tokens, size)
    layout = make_layout(blocks, blocks, torch.ones(1, blocks.num_blocks, blocks.num_blocks).bool(), one_group(1))
    rows, _ = query_tiles(layout, num_tokens, block_m)
    assert rows.shape[1] == blocks.num_blocks * -(-size // block_m)
