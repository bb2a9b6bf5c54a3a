"""Attention over the ranks of `seq` is attention on one rank: four gloo processes, and every way to spread tokens.

The file is its own worker: with a folder it forks the ranks, each of which runs all cases and writes what it found.
"""

import json
import math
import multiprocessing
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError, RuntimeFailure
from longvid.kernels.dense import attend
from longvid.parallel.around import Around, KvPart, rotate
from longvid.parallel.attention import JointSpan, Text
from longvid.parallel.collectives import Group, new_group
from longvid.parallel.mesh import make_mesh
from longvid.parallel.sequence import WholeSequence, make_sequence
from longvid.parallel.sequence_libraries import DeepSpeedAttention, even_part
from longvid.parallel.spans import overlap, split
from longvid.parallel.topology import Topology
from longvid.parallel.ulysses import deal_heads
from longvid.parallel.usp import UspAttention
from longvid.sparsity.make import make_policy
from longvid.sparsity.runtime import Place, SparseRuntime
from longvid.sparsity.settings import AdaSpa, Sta
from longvid.sparsity.tokens import TokenMap

NUM_RANKS = 4
HEADS, WIDTH = 4, 8
ALONE = Group((0,), 0)


# --------------------------------------------------------------------------------------------------- the units of tests


@dataclass(frozen=True)
class Unit:
    """`left`, `right` and `shared` name stored parts: (unit, span of its `store`)."""

    num_tokens: int
    store: tuple[tuple[int, int], ...] = ()
    left: tuple[int, int] | None = None
    right: tuple[int, int] | None = None
    shared: tuple[int, int] | None = None


UNEVEN = (
    Unit(37, store=((0, 5), (29, 37))),
    Unit(23, store=((0, 9), (15, 23), (4, 20)), left=(0, 1)),  # stored by a unit of more tokens
    Unit(23, right=(1, 0)),
    Unit(50, store=((0, 50), (25, 26)), left=(1, 1), right=(0, 0)),
    Unit(3, store=((0, 1), (2, 3), (0, 3)), left=(3, 0), right=(1, 2)),  # fewer tokens than ranks
    Unit(1, store=((0, 1),), left=(4, 1), right=(4, 0)),
    Unit(41, left=(5, 0), right=(3, 1), shared=(1, 0)),
    Unit(30, shared=(1, 1)),
)
EVEN = (
    Unit(36, store=((0, 5), (29, 36))),
    Unit(24, store=((0, 9), (15, 24)), left=(0, 1), right=(0, 0)),
    Unit(8, left=(1, 1), right=(1, 0), shared=(0, 0)),
)


def run_units(units, sequence, num_heads, dtype, costs=None):
    """All outputs, whole on every rank, and what each unit stored. Every rank draws the same tensors."""
    generator = torch.Generator().manual_seed(1)
    outputs, parts = [], []
    for unit in units:
        qkv = torch.randn(3, 1, unit.num_tokens, num_heads, WIDTH, generator=generator).to(dtype)
        lengths = [length_of(units, name) for name in (unit.left, unit.right)]
        angles = torch.randn(1, sum(lengths) + unit.num_tokens, 1, WIDTH // 2, generator=generator)
        angles = angles.repeat_interleave(2, -1)
        names = (unit.left, unit.right, unit.shared)
        left, right, shared = (parts[name[0]][name[1]] if name else None for name in names)
        stop = length_of(units, unit.shared) + 1  # any place will do
        store = tuple(slice(*span) for span in unit.store)
        rope = angles.cos(), angles.sin()
        around = Around(rope, left, right, lengths[0], store, head_costs=costs, shared=shared, shared_stop=stop)
        out, stored = sequence.attend(*qkv[:, :, sequence.part(unit.num_tokens)], around)
        outputs.append(sequence.gather(out.flatten(2), unit.num_tokens))
        parts.append(stored)
    return outputs, parts


def length_of(units, name):
    if name is None:
        return 0
    start, stop = units[name[0]].store[name[1]]
    return stop - start


def error_against_one_rank(units, sequence, num_heads=HEADS, dtype=torch.float32, costs=None):
    """The largest difference of any output."""
    outputs, _ = run_units(units, sequence, num_heads, dtype, costs)
    expected, _ = run_units(units, WholeSequence(), num_heads, dtype)
    assert [out.dtype for out in outputs] == [dtype] * len(units)
    return max((out - whole).abs().max().item() for out, whole in zip(outputs, expected, strict=True))


def stored_error(units, ulysses, ring):
    """How far stored K/V are from this rank's heads and tokens of the whole; `offset` and `lengths` must say which."""
    _, parts = run_units(units, UspAttention(ulysses, ring), HEADS, torch.float32)
    _, wholes = run_units(units, WholeSequence(), HEADS, torch.float32)
    heads = HEADS // ulysses.size
    mine = slice(ulysses.index * heads, (ulysses.index + 1) * heads)
    errors = [0.0]
    for part, whole in zip(chain(*parts), chain(*wholes), strict=True):
        if part.lengths:
            assert sum(part.lengths) == whole.key.shape[1]
            assert part.offset == sum(part.lengths[: ring.index]) or not part.lengths[ring.index]
            assert part.lengths[ring.index] == part.key.shape[1]
        for one, other in ((part.key, whole.key), (part.value, whole.value)):
            expected = other[:, part.offset : part.offset + one.shape[1], mine]
            assert one.shape == expected.shape and one.is_contiguous()
            errors += [(one - expected).abs().max().item()] if one.numel() else []
    return max(errors)


STEPS = 5
BETWEEN = TokenMap(range(2, 8), range(10), range(2, 8), 3, 3)
"""Six latents of nine tokens between two neighbours, of each of which two latents are seen."""


def run_sparse(sequence, settings):
    """All steps of a chunk whose neighbours' K/V are cached, by a policy of sparse attention."""
    generator = torch.Generator().manual_seed(2)
    runtime = SparseRuntime(make_policy(settings), 1, STEPS, always=True)
    layouts = []
    runtime.on_layout = layouts.append
    angles = torch.randn(1, 90, 1, WIDTH // 2, generator=generator).repeat_interleave(2, -1)
    rope = angles.cos(), angles.sin()
    neighbour = torch.randn(3, 1, 54, HEADS, WIDTH, generator=generator)[:, :, sequence.part(54)]
    own_rope = rope[0][:, :54], rope[1][:, :54]
    _, (left, right) = sequence.attend(*neighbour, Around(own_rope, store=(slice(36, 54), slice(0, 18))))
    outputs = []
    for step in range(STEPS):
        qkv = torch.randn(3, 1, 54, HEADS, WIDTH, generator=generator)[:, :, sequence.part(54)]
        attention = runtime.at(Place(0, 0, 0, step), BETWEEN, qkv.device)
        out, _ = sequence.attend(*qkv, Around(rope, left, right, 18, attention=attention))
        outputs.append(sequence.gather(out.flatten(2), 54))
        runtime.end_step(0, step)
    assert not runtime.state()
    return torch.stack(outputs), layouts


def sparse_error(sequence, settings):
    ours, _ = run_sparse(sequence, settings)
    alone, layouts = run_sparse(WholeSequence(), settings)
    assert any(layout is not None and layout.density() < 0.9 for layout in layouts)
    return (ours - alone).abs().max().item()


def run_joint(sequence, num_tokens, lengths):
    """Units whose text sees and is seen: text, this rank's tokens put together, and what was stored for the next unit.

    Of two prompts the second comes in gradually. Rotary rows differ from head to head.
    """
    generator = torch.Generator().manual_seed(3)
    edge, outputs, left = num_tokens // 2, [], None
    spans = [JointSpan(slice(0, edge), 0), JointSpan(slice(edge, num_tokens), 0)]
    if len(lengths) > 1:
        spans = [JointSpan(slice(0, edge), 0), JointSpan(slice(edge, edge + 4), 0, 1, 0.3)]
        spans.append(JointSpan(slice(edge + 4, num_tokens), 1))
    for num_left in (0, 8):
        text = Text(*torch.randn(3, 1, sum(lengths), HEADS, WIDTH, generator=generator), lengths, spans)
        qkv = torch.randn(3, 1, num_tokens, HEADS, WIDTH, generator=generator)
        angles = torch.randn(1, num_left + num_tokens, HEADS, WIDTH // 2, generator=generator).repeat_interleave(2, -1)
        store = (slice(num_tokens - 8, num_tokens),)
        seen = {"left": left, "num_left": num_left, "shared": left, "shared_stop": num_left}
        around = Around((angles.cos(), angles.sin()), **seen, store=store, text=text)
        out, [left] = sequence.attend(*qkv[:, :, sequence.part(num_tokens)], around)
        outputs.append(out[:, : sum(lengths)].flatten(2))
        outputs.append(sequence.gather(out[:, sum(lengths) :].flatten(2).contiguous(), num_tokens))
    return outputs


def joint_error(sequence, group, num_tokens=37):
    """The largest difference of text and tokens from one rank's; and text must have the same bits on all ranks."""
    errors = []
    for lengths in ([6], [3, 5]):
        ours = run_joint(sequence, num_tokens, lengths)
        alone = run_joint(WholeSequence(), num_tokens, lengths)
        errors += [(a - b).abs().max() for a, b in zip(ours, alone, strict=True)]
        for text in ours[::2]:
            assert all(torch.equal(text, other) for other in group.all_gather(text, [text.shape] * group.size))
    return max(errors).item()


# ------------------------------------------------------------------------------------------------ what the ranks run


def usp_case(mesh):
    return lambda: error_against_one_rank(UNEVEN, UspAttention(mesh.ulysses, mesh.ring))


def gather_error(mesh):
    sequence, error = UspAttention(mesh.ulysses, mesh.ring), 0.0
    for num_tokens in (1, 3, 4, 5, 37, 40):
        x = torch.randn(2, num_tokens, 3, generator=torch.Generator().manual_seed(num_tokens))
        back = sequence.gather(x[:, sequence.part(num_tokens)], num_tokens)
        assert back.shape == x.shape
        error = max(error, (back - x).abs().max().item())
    return error


def deepspeed_case(mesh):
    sequence = make_sequence("deepspeed", mesh.ulysses, mesh.ring, mesh.seq)
    assert isinstance(sequence, DeepSpeedAttention)
    with pytest.raises(InputError, match=r"37 tokens of a unit / 2 ranks"):
        sequence.part(37)
    return error_against_one_rank(EVEN, sequence)


def deepspeed_against_ours(mesh):
    theirs, _ = run_units(EVEN, DeepSpeedAttention(mesh.seq), HEADS, torch.float32)
    ours, _ = run_units(EVEN, UspAttention(mesh.ulysses, mesh.ring), HEADS, torch.float32)
    return max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))


def diffusers_error(mesh):
    """Against the context parallelism of diffusers, which has Ulysses for equal parts."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=NUM_RANKS))
    their_mesh = torch.distributed.init_device_mesh("cpu", (1, NUM_RANKS), mesh_dim_names=("ring", "ulysses"))
    config.setup(mesh.rank, NUM_RANKS, torch.device("cpu"), mesh=their_mesh)
    sequence = UspAttention(mesh.ulysses, mesh.ring)
    qkv = torch.randn(3, 1, 40, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))[:, :, sequence.part(40)]
    still = Around((torch.ones(1, 40, 1, WIDTH), torch.zeros(1, 40, 1, WIDTH)))
    ours, _ = sequence.attend(*qkv, still)
    return (ours - dispatch_attention_fn(*qkv, parallel_config=config)).abs().max().item()


class XfuserDouble:
    """What xfuser's attention computes, with its arguments, where there is no CUDA; its groups must be of 2 x 2 ranks.

    As there, each rank attends with its own share of the heads, and reads no others of the joint tensors.
    """

    def __init__(self, attn_type):
        assert attn_type is XfuserKernel.TORCH_FLASH or find_spec("flash_attn")
        assert all(torch.distributed.get_world_size(group) == 2 for group in (GROUPS.ULYSSES_PG, GROUPS.RING_PG))
        self.rank = torch.distributed.get_rank()

    def __call__(self, attn, query, key, value, **joint):
        heads = slice(self.rank % 2 * HEADS // 2, (self.rank % 2 + 1) * HEADS // 2)
        q, k, v = (gather_all(x)[:, :, heads] for x in (query, key, value))
        if joint:
            assert joint["joint_tensor_query"].shape == (1, 0, HEADS, WIDTH) and joint["joint_strategy"] == "rear"
            k = torch.cat([k, joint["joint_tensor_key"][:, :, heads]], 1)
            v = torch.cat([v, joint["joint_tensor_value"][:, :, heads]], 1)
        outs = gather_all(attend(q, k, v)).chunk(NUM_RANKS, 1)
        row = self.rank // 2 * 2
        return torch.cat(outs[row : row + 2], 2)[:, split(q.shape[1], NUM_RANKS)[self.rank]]


XfuserKernel = Enum("XfuserKernel", ["FA", "TORCH_FLASH"])
GROUPS = SimpleNamespace()


def gather_all(x):
    parts = [torch.empty_like(x) for _ in range(NUM_RANKS)]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def xfuser_case(mesh):
    library = {"xFuserLongContextAttention": XfuserDouble, "AttnType": XfuserKernel}
    sys.modules["xfuser.core.long_ctx_attention"] = SimpleNamespace(**library)
    sys.modules["yunchang.globals"] = SimpleNamespace(PROCESS_GROUP=GROUPS)
    torch.cuda.is_available = lambda: True
    sequence = make_sequence("xfuser", mesh.ulysses, mesh.ring, mesh.seq)
    with pytest.raises(InputError, match=r"runtime\.dtype bfloat16, not float32"):
        error_against_one_rank(EVEN, sequence)
    return error_against_one_rank(EVEN, sequence, dtype=torch.float64)


def lone_library_handle():
    handle = Group((torch.distributed.get_rank(),), 0).library_handle()
    return float(torch.distributed.get_world_size(handle) - 1)


def lost_member(mesh):
    """The last rank leaves without a word; the others are told."""
    if mesh.rank == NUM_RANKS - 1:
        return 0.0
    with pytest.raises(RuntimeFailure, match="exchange between the ranks 0, 1, 2, 3 failed"):
        for _ in range(100):
            mesh.seq.rotate(torch.ones(1000), (1000,))()
    return 0.0


ADASPA = AdaSpa(policy="adaspa", tile=16, search_at=(0.2, 0.6), sample_every=1)
STA = Sta(policy="sta", tile=(1, 2, 2), window=(3, 2, 2), dense_steps=0.2)


def cases(rank):
    """Every case by its name; all ranks run them in this order."""
    pairs = {ring: make_mesh_of(2, ring, rank) for ring in (1, 2)}
    four = {ring: make_mesh_of(1, ring, rank) for ring in (1, 2, 4)}
    three = new_group((0, 1, 2), rank)
    found = {
        "ulysses 2": usp_case(pairs[1]),
        "ring 2": usp_case(pairs[2]),
        "ulysses 4": usp_case(four[1]),
        "ring 4": usp_case(four[4]),
        "ulysses 2 x ring 2": usp_case(four[2]),
        "bfloat16 ring": lambda: error_against_one_rank(
            UNEVEN, UspAttention(four[2].ulysses, four[2].ring), dtype=torch.bfloat16
        ),
        "gather ulysses": lambda: gather_error(four[1]),
        "gather both": lambda: gather_error(four[2]),
        "stored ulysses": lambda: stored_error(UNEVEN, four[1].ulysses, four[1].ring),
        "stored both": lambda: stored_error(UNEVEN, four[2].ulysses, four[2].ring),
        "text in ulysses": lambda: joint_error(UspAttention(four[1].ulysses, four[1].ring), four[1].seq),
        "text in a ring": lambda: joint_error(UspAttention(four[4].ulysses, four[4].ring), four[4].seq),
        "text in both": lambda: joint_error(UspAttention(four[2].ulysses, four[2].ring), four[2].seq),
        "dealt heads": lambda: error_against_one_rank(
            UNEVEN, UspAttention(four[2].ulysses, four[2].ring), costs=(0.1, 1.0, 0.9, 0.2)
        ),
        "sparse ulysses": lambda: sparse_error(UspAttention(four[1].ulysses, four[1].ring), ADASPA),
        "sparse ring": lambda: sparse_error(UspAttention(four[4].ulysses, four[4].ring), STA),
        "sparse both": lambda: sparse_error(UspAttention(four[2].ulysses, four[2].ring), STA),
        "diffusers": lambda: diffusers_error(four[1]),
        "lone library handle": lone_library_handle,
        "xfuser": lambda: xfuser_case(four[2]),
    }
    if three is not None:
        alone = Group((rank,), 0)
        found["ulysses 3"] = lambda: error_against_one_rank(UNEVEN, UspAttention(three, alone), num_heads=6)
        found["ring 3"] = lambda: error_against_one_rank(UNEVEN, UspAttention(alone, three))
    if find_spec("deepspeed") is not None and rank < 2:
        found["deepspeed"] = lambda: deepspeed_case(pairs[1])
        found["deepspeed with text"] = lambda: joint_error(DeepSpeedAttention(pairs[1].seq), pairs[1].seq, 36)
        found["deepspeed against ours"] = lambda: deepspeed_against_ours(pairs[1])
    return {**found, "lost member": lambda: lost_member(four[1])}


def make_mesh_of(stage, ring, rank):
    return make_mesh(Topology(stage=stage, seq=NUM_RANKS // stage, ring=ring), rank, torch.device("cpu"), 180.0)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=180),
    )
    found = {}
    for name, case in cases(rank).items():
        try:
            found[name] = case()
        except BaseException:
            found[name] = traceback.format_exc()
            break  # the others' next messages would not fit
    (folder / f"{rank}.json").write_text(json.dumps(found))


def run_ranks(folder):
    """Fork the ranks from a process that has their imports behind it and has computed nothing."""
    import diffusers.models._modeling_parallel
    import diffusers.models.attention_dispatch  # noqa: F401

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(NUM_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]))


# ------------------------------------------------------------------------------------------------ tests with processes


@pytest.fixture(scope="module")
def found(run_worker, tmp_path_factory):
    """What each rank found: by case, an error or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    run_worker(__file__, folder, 240)
    files = [folder / f"{rank}.json" for rank in range(NUM_RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {"": (folder / "log").read_text()} for file in files]


def worst(found, name, ranks=range(NUM_RANKS)):
    errors = [found[rank].get(name, found[rank]) for rank in ranks]
    for error in errors:
        assert isinstance(error, float), error
    return max(errors)


@pytest.mark.parametrize("name", ["ulysses 2", "ulysses 4", "ring 2", "ring 4", "ulysses 2 x ring 2"])
def test_attention_over_ranks_is_that_of_one_rank(found, name):
    assert worst(found, name) < 1e-5


@pytest.mark.parametrize("name", ["dealt heads", "sparse ulysses", "sparse ring", "sparse both"])
def test_sparse_attention_over_ranks_is_that_of_one_rank(found, name):
    assert worst(found, name) < 1e-5


@pytest.mark.parametrize("name", ["text in ulysses", "text in a ring", "text in both"])
def test_text_beside_tokens_over_ranks_gives_what_one_rank_gives(found, name):
    assert worst(found, name) < 1e-5


@pytest.mark.parametrize("name", ["ulysses 3", "ring 3"])
def test_attention_over_three_ranks_is_that_of_one_rank(found, name):
    assert worst(found, name, range(3)) < 1e-5


def test_a_ring_in_half_precision_rounds_once(found):
    assert worst(found, "bfloat16 ring") < 0.05


@pytest.mark.parametrize("name", ["gather ulysses", "gather both"])
def test_gather_puts_the_parts_together(found, name):
    assert worst(found, name) == 0


@pytest.mark.parametrize("name", ["stored ulysses", "stored both"])
def test_each_rank_stores_its_heads_of_its_groups_tokens(found, name):
    assert worst(found, name) == 0


def test_ulysses_is_that_of_diffusers(found):
    assert worst(found, "diffusers") < 1e-6


def test_xfuser_is_handed_all_that_attention_needs(found):
    assert worst(found, "xfuser") < 1e-5


def test_a_lone_rank_has_a_process_group_for_libraries(found):
    assert worst(found, "lone library handle") == 0


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("name", ["deepspeed", "deepspeed with text", "deepspeed against ours"])
def test_deepspeed_is_attention_of_one_rank(found, name):
    assert worst(found, name, range(2)) < 1e-5


def test_an_exchange_with_a_rank_that_is_gone_fails(found):
    worst(found, "lost member")


# --------------------------------------------------------------------------------------------- tests without processes


@given(num_tokens=st.integers(0, 1000), num_parts=st.integers(1, 40))
def test_parts_are_in_order_without_gaps_and_as_even_as_they_go(num_tokens, num_parts):
    parts = split(num_tokens, num_parts)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_tokens))
    lengths = [part.stop - part.start for part in parts]
    assert len(parts) == num_parts and max(lengths) - min(lengths) <= 1


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_overlap_is_what_both_hold_and_lies_in_the_first(a, a_length, b, b_length):
    found = overlap(slice(a, a + a_length), slice(b, b + b_length))
    assert set(range(found.start, found.stop)) == set(range(a, a + a_length)) & set(range(b, b + b_length))
    assert a <= found.start <= found.stop <= a + a_length


def test_one_rank_needs_no_library():
    assert isinstance(make_sequence("xfuser", ALONE, ALONE, ALONE), WholeSequence)


def test_ours_is_the_default_backend():
    pair = Group((0, 1), 0)
    assert isinstance(make_sequence("longvid", pair, ALONE, pair), UspAttention)


def test_deepspeed_has_no_ring():
    pair = Group((0, 1), 0)
    with pytest.raises(InputError, match=r"mesh\.ring must be 1, not 2"):
        make_sequence("deepspeed", ALONE, pair, pair)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    pair = Group((0, 1), 0)
    with pytest.raises(
        InputError, match=r"sequence\.backend: deepspeed cannot be imported .*pip install longvid.deepspeed"
    ):
        make_sequence("deepspeed", pair, ALONE, pair)


def test_xfuser_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair = Group((0, 1), 0)
    with pytest.raises(InputError, match="xfuser needs CUDA"):
        make_sequence("xfuser", pair, ALONE, pair)


def test_unequal_parts_are_refused_with_their_numbers():
    pair = Group((0, 1), 1)
    assert even_part("xfuser", 10, pair) == slice(5, 10)
    with pytest.raises(InputError, match=r"xfuser needs equal parts, but 11 tokens of a unit / 2 ranks"):
        even_part("xfuser", 11, pair)


def test_one_rank_attends_to_neighbours_by_the_definition():
    outputs, parts = run_units(UNEVEN, WholeSequence(), HEADS, torch.float64)
    assert [len(stored) for stored in parts] == [len(unit.store) for unit in UNEVEN]
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, UNEVEN[0].num_tokens, HEADS, WIDTH, generator=generator).double()
    angles = torch.randn(1, UNEVEN[0].num_tokens, 1, WIDTH // 2, generator=generator)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn for x in (q, k))
    scores = torch.einsum("blhd,bthd->bhlt", q, k.conj()).real / math.sqrt(WIDTH)
    expected = torch.einsum("bhlt,bthd->blhd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=24), st.integers(1, 6))
def test_heads_are_dealt_once_each_and_no_rank_has_more_than_a_head_s_cost_too_much(costs, num_ranks):
    costs = costs * num_ranks
    order = deal_heads(costs, len(costs), num_ranks)
    assert sorted(order) == list(range(len(costs)))
    each = len(costs) // num_ranks
    hands = [sum(costs[head] for head in order[i * each : (i + 1) * each]) for i in range(num_ranks)]
    assert max(hands) - min(hands) <= max(costs) + 1e-9


def test_heads_without_costs_stay_in_their_order():
    assert deal_heads(None, 6, 3) == [0, 1, 2, 3, 4, 5]


def test_shared_kv_stand_in_the_place_before_the_chunks_own_tokens():
    """DiTCtrl's sharing, written out: one softmax over the unit's keys and the shared, rotated to that place."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 1, 7, HEADS, WIDTH, generator=generator)
    shared = KvPart(*torch.randn(2, 1, 2, HEADS, WIDTH, generator=generator))
    angles = torch.randn(1, 7, 1, WIDTH // 2, generator=generator).repeat_interleave(2, -1)
    rope = angles.cos(), angles.sin()
    around = Around(rope, shared=shared, shared_stop=3)
    out, _ = WholeSequence().attend(q, k, v, around)
    place = rope[0][:, 1:3], rope[1][:, 1:3]
    keys = torch.cat([rotate(k, rope), rotate(shared.key, place)], 1)
    scores = torch.einsum("blhd,bthd->bhlt", rotate(q, rope), keys) / WIDTH**0.5
    expected = torch.einsum("bhlt,bthd->blhd", scores.softmax(-1), torch.cat([v, shared.value], 1))
    assert (out - expected).abs().max() <= 1e-5
    alone, _ = WholeSequence().attend(q, k, v, Around(rope))
    assert (out - alone).abs().max() > 1e-3
