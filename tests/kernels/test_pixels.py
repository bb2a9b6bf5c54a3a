"""Images as bytes, by the C++ and by torch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels.pixels import to_bytes

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))


@given(sizes=sizes, patch=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**31), bf16=st.booleans())
def test_bytes_are_those_of_torch(sizes: tuple[int, int, int], patch: int, seed: int, bf16: bool) -> None:
    x = torch.randn(*sizes, 3 * patch**2, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16() if bf16 else x
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)  # the C++ leaves it to torch, unless it is dense
    found = to_bytes(x, patch)
    assert found.shape == (sizes[0], sizes[1] * patch, sizes[2] * patch, 3)
    assert torch.equal(found, to_bytes(strided, patch))
    cell = x[-1, -1, -1].float().view(3, patch, patch)  # colours, columns, rows
    exact = ((cell.clamp(-1, 1) + 1) * 127.5).round().byte().permute(2, 1, 0)
    assert torch.equal(found[-1, -patch:, -patch:], exact)


def test_between_two_bytes_it_rounds_to_the_even_one() -> None:
    halves = torch.arange(255) + 0.5
    x = (halves / 127.5 - 1)[None, None, :, None].expand(1, 1, 255, 3).contiguous()
    exact = ((x + 1) * 127.5).round().byte()
    assert torch.equal(to_bytes(x), exact)
