"""AdaSpa searches when it should, for the tiles that hold the attention, with budgets that follow recall."""

import gc
import weakref

import pytest
import torch

from longvid.kernels import reference
from longvid.kernels.dense import attend_lse_exact
from longvid.sparsity.adaspa import AdaSpaPolicy, choose, head_sparsity
from longvid.sparsity.settings import AdaSpa
from longvid.sparsity.tiles import tiling
from longvid.sparsity.tokens import TokenMap

JOINT = TokenMap(range(2, 8), range(2, 8), range(3, 7), 7, 9, text_before=5, text_behind=11)
LONG = TokenMap(range(9), range(9), range(9), 12, 14)
CPU = torch.device("cpu")


def make(**changes):
    return AdaSpaPolicy(AdaSpa(policy="adaspa", **{"tile": 16, "sample_every": 1, **changes}))


def exact_mass(q, k, tiles):
    return reference.block_mass(q, k, attend_lse_exact(q, k, k)[1], tiles.q, tiles.k)


def test_the_mask_holds_the_tiles_of_largest_mass(film, attend_by):
    q, k, v = film(JOINT)
    memory = {}
    attend_by(make(sparsity=0.75, recall=1), (q, k, v), 2, JOINT, memory)
    tiles = tiling(JOINT, 16, CPU)
    mass = exact_mass(q, k, tiles)
    optional = [c for c in range(tiles.k.num_blocks) if not tiles.visible[:, c].all()]
    for h in range(4):
        for row in range(tiles.q.num_blocks):
            expected = tiles.visible[row] | tiles.own[row]
            first = [c for c in optional if tiles.own[row, c]]
            others = sorted((c for c in optional if c not in first), key=lambda c: -mass[0, h, row, c])
            expected[(first + others)[: round(0.25 * len(optional))]] = True
            assert torch.equal(memory["mask"][h, row], expected)


def test_it_searches_at_the_first_search_and_again_with_the_cached_lse(film, attend_by):
    policy, memory = make(search_at=(0.2, 0.6)), {}
    masks, layouts = [], []
    for step in range(10):
        layouts.append(attend_by(policy, film(JOINT, step), step, JOINT, memory)[1])
        masks.append(memory.get("mask"))
        assert ("lse" in memory) == (2 <= step < 6)
        if "lse" in memory:
            assert memory["lse"].shape == (1, 4, JOINT.num_queries) and memory["lse"].dtype == torch.float32
    assert [layout is None for layout in layouts] == [True] * 3 + [False] * 7
    assert masks[1] is None and masks[2] is masks[5] and masks[6] is masks[9] and masks[2] is not masks[6]
    assert layouts[3] is layouts[5] and layouts[6] is layouts[9]
    assert torch.equal(layouts[6].mask(), masks[6])
    q, k, _ = film(JOINT, 6)
    tiles = tiling(JOINT, 16, CPU)
    old = attend_lse_exact(*film(JOINT, 2))[1]
    mass = reference.block_mass(q, k, old, tiles.q, tiles.k).float()
    even = choose(mass, torch.full((4,), 0.8), tiles)
    recall = (mass * even).sum((0, 2, 3)) / mass.sum((0, 2, 3))
    assert torch.equal(masks[6], choose(mass, head_sparsity(recall, 0.8, 0.8), tiles).flatten(0, 1))


def test_one_search_keeps_no_lse(film, attend_by):
    memory = {}
    attend_by(make(search_at=(0.2,)), film(JOINT), 2, JOINT, memory)
    assert set(memory) == {"mask", "searched"}


def test_with_an_emptied_memory_it_is_dense_once_and_searches(film, attend_by):
    policy, memory = make(), {}
    layouts = []
    for step in range(2, 9):
        if step in (4, 7):
            memory = {}
        layouts.append(attend_by(policy, film(JOINT), step, JOINT, memory)[1])
    assert [layout is None for layout in layouts] == [True, False, True, False, False, True, False]
    assert set(memory) == {"mask", "searched"}  # there is no other search behind step 7


def test_the_last_step_learns_nothing(film, attend_by):
    memory = {}
    assert attend_by(make(), film(JOINT), 9, JOINT, memory)[1] is None and not memory


def test_layouts_are_freed_with_their_masks(film, attend_by):
    policy, memory = make(), {}
    attend_by(policy, film(JOINT), 2, JOINT, memory)
    layout = weakref.ref(attend_by(policy, film(JOINT), 3, JOINT, memory)[1])
    assert layout() is not None
    memory.clear()
    gc.collect()
    assert layout() is None


@pytest.mark.parametrize("tile", [32, 64])
def test_a_sampled_search_finds_nearly_what_an_exact_one_finds(film, attend_by, tile):
    q, k, v = film(LONG, heads=6)
    tiles = tiling(LONG, tile, CPU)
    mass = exact_mass(q, k, tiles)
    recall = []
    for sample_every in (1, AdaSpa(policy="adaspa").sample_every):
        memory = {}
        attend_by(make(tile=tile, sample_every=sample_every, recall=1), (q, k, v), 2, LONG, memory)
        recall.append((mass * memory["mask"].view_as(mass)).sum((0, 2, 3)) / mass.sum((0, 2, 3)))
    exact, sampled = recall
    assert (sampled >= 0.95 * exact).all()
    share = memory["mask"].double().mean()
    assert (exact > 1.5 * share).all()  # the inputs have something to find


def test_heads_of_high_recall_give_to_those_of_low():
    recall = torch.tensor([0.9, 0.1, 0.5, 0.95, 0.3, 0.6])
    expected = torch.tensor([0.9, 0.7, 0.8, 0.9, 0.7, 0.8])
    torch.testing.assert_close(head_sparsity(recall, 0.8, 0.8), expected)


def test_no_head_both_gives_and_takes():
    recall = torch.tensor([0.9, 0.85, 0.99, 0.95, 0.9])
    torch.testing.assert_close(head_sparsity(recall, 0.8, 0.8), torch.tensor([0.8, 0.7, 0.9, 0.9, 0.7]))


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.3, 0.5, 0.8, 1])
def test_head_budgets_are_shares_and_keep_the_average(sparsity):
    found = head_sparsity(torch.tensor([0.9, 0.1, 0.5, 0.95]), sparsity, 0.8)
    assert found.min() >= 0 and found.max() <= 1
    assert found.mean().item() == pytest.approx(sparsity)


def test_every_row_keeps_a_tile_at_full_sparsity(film, attend_by):
    memory = {}
    attend_by(make(sparsity=1), film(LONG), 2, LONG, memory)
    assert memory["mask"].any(-1).all()
