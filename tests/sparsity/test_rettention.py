"""Re-ttention corrects a window by what the last dense step learned."""

import pytest
import torch

from longvid.kernels import reference
from longvid.kernels.dense import attend, attend_lse_exact
from longvid.kernels.dispatch import sparse_attention
from longvid.sparsity.rettention import RettentionPolicy, window_layout
from longvid.sparsity.settings import Rettention
from longvid.sparsity.tokens import TokenMap

FILM = TokenMap(range(8), range(8), range(8), 6, 8)
CONTEXT = TokenMap(range(9, 15), range(8, 16), range(10, 14), 5, 7, text_before=3)
CPU = torch.device("cpu")


def make(**changes):
    return RettentionPolicy(Rettention(policy="rettention", **{"tile": 16, "keep": 0.15, "residual": False, **changes}))


def test_a_window_lies_around_each_tile_and_keeps_its_size_at_the_ends():
    mask = window_layout(FILM, 16, 0.2, 1, CPU).mask()[0]
    count = mask.shape[1]
    assert (mask.sum(-1) == 5).all()  # 0.2 of 384 keys are 4.8 tiles
    for row in range(count):
        first = min(max(row - 2, 0), count - 5)
        assert mask[row].nonzero()[:, 0].tolist() == list(range(first, first + 5))


def test_context_queries_look_at_the_end_that_they_are_next_to():
    layout = window_layout(CONTEXT, 16, 0.1, 1, CPU)
    mask = layout.mask()[0]
    q_block, k_block = layout.q.block_of(CONTEXT.num_queries)[0], layout.k.block_of(CONTEXT.num_keys)[0]
    own = range(3 + 2 * 35, 3 + 6 * 35)
    assert mask[q_block[3], k_block[own[0]]] and not mask[q_block[3], k_block[own[-1]]]
    assert mask[q_block[-1], k_block[own[-1]]] and not mask[q_block[-1], k_block[own[0]]]


def test_steps_are_dense_in_their_turn(film, run):
    films = [film(FILM, seed) for seed in range(10)]
    _, layouts = run(make(dense_steps=0.3, refresh_every=3), FILM, films)
    assert [layout is None for layout in layouts] == [True] * 4 + [False, False, True, False, False, True]


def test_an_emptied_memory_is_learned_again(film, attend_by):
    policy, memory = make(), {}
    attend_by(policy, film(FILM), 3, FILM, memory)
    assert attend_by(policy, film(FILM), 4, FILM, memory)[1] is not None
    memory.clear()
    assert attend_by(policy, film(FILM), 5, FILM, memory)[1] is None
    assert attend_by(policy, film(FILM), 6, FILM, memory)[1] is not None


def test_rho_is_the_share_of_the_whole_softmax_and_grows(film, attend_by):
    policy, memory = make(growth=0.04), {}
    q, k, v = film(FILM)
    attend_by(policy, (q, k, v), 3, FILM, memory)
    layout = window_layout(FILM, 16, 0.15, 4, CPU)
    full, lse = (x.double() for x in attend_lse_exact(q, k, v))
    window, window_lse = reference.sparse_attention(q, k, v, layout)
    rho = (window_lse - lse).exp()
    torch.testing.assert_close(memory["rho"].double(), rho, rtol=1e-5, atol=1e-6)
    for sparse_steps in (1, 2):
        out, used = attend_by(policy, (q, k, v), 3 + sparse_steps, FILM, memory)
        grown = (rho + 0.04 * sparse_steps).clamp(max=1)
        assert torch.equal(used.mask(), layout.mask())
        torch.testing.assert_close(out.double(), grown[..., None] * window, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory["rho"].double(), grown, rtol=1e-5, atol=1e-6)
    assert full.shape == out.shape


def test_with_the_residual_and_no_growth_nothing_is_lost_while_nothing_changes(film, attend_by):
    policy, memory = make(residual=True, growth=0), {}
    inputs = film(FILM)
    dense, _ = attend_by(policy, inputs, 3, FILM, memory)
    sparse, layout = attend_by(policy, inputs, 4, FILM, memory)
    assert layout.density() < 0.3
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_it_beats_a_plain_window_where_that_holds_part_of_the_mass(film, attend_by, residual):
    """The rest of the attention is spread over many keys, whose values cancel out. The step after is not the same."""
    q, k, v = film(FILM, noise=0.6)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(v.shape, generator=generator)
    policy, memory = make(residual=residual), {}
    attend_by(policy, (q, k, v), 3, FILM, memory)
    inputs = tuple(x + 0.1 * torch.randn(x.shape, generator=generator) for x in (q, k, v))
    out, layout = attend_by(policy, inputs, 4, FILM, memory)
    plain, _ = sparse_attention(*inputs, layout)
    assert 0.2 < memory["rho"].mean() < 0.9
    corrected_error, plain_error = ((x - attend(*inputs)).square().mean() for x in (out, plain))
    assert corrected_error < (0.5 if residual else 0.8) * plain_error


def test_density_is_that_of_the_window():
    for tokens in (FILM, CONTEXT):
        policy = make()
        assert policy.density(tokens) == window_layout(tokens, 16, 0.15, 3, CPU).density()
