"""Merged parts are attention to all keys, whatever run found which part."""

import torch

from longvid.kernels.dense import attend_lse_exact
from longvid.parallel.vin import merge, pack


def test_parts_of_chunks_merge_to_attention_to_all_of_them():
    torch.manual_seed(0)
    heads, tokens, width = 2, 5, 4
    query = torch.randn(1, tokens, heads, width)
    counts = [3, 0, 7, 1]  # one chunk has no key latents
    keys, values = (torch.randn(1, sum(counts), heads, width) for _ in range(2))

    def look(key, value):
        out, lse = attend_lse_exact(query, key, value)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)

    parts = [pack(*look(k, v)) for k, v in zip(keys.split(counts, 1), values.split(counts, 1), strict=True)]
    assert parts[0].shape == (heads, tokens, width + 1)
    for found, expected in zip(merge(parts), look(keys, values), strict=True):
        assert (found - expected).abs().max() <= 1e-6
    assert all(
        torch.equal(a, b) for a, b in zip(merge(parts[2:3]), look(*(x[:, 3:10] for x in (keys, values))), strict=True)
    )
