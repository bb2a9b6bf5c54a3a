"""Coordinates are a bijection, and the mesh that is chosen solves the equation or says why none does."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.parallel.topology import AXES, Topology, Workload, choose_by_shape, fitting_meshes, predicted_time
from longvid.settings import MeshSettings

SIZES = st.integers(1, 4)
TOPOLOGIES = st.builds(Topology, replica=SIZES, stage=SIZES, chunk=SIZES, guidance=SIZES, seq=SIZES)
WORK = Workload(num_units=1000, in_flight=8, num_layers=8, num_heads=4, branches=1)


def choose_topology(num_ranks, mesh, work):
    return choose_by_shape(fitting_meshes(num_ranks, mesh, work), work)


@given(TOPOLOGIES, st.data())
def test_ranks_and_coordinates_are_one_to_one(topology, data):
    rank = data.draw(st.integers(0, topology.num_ranks - 1))
    place = topology.coordinate(rank)
    assert topology.rank(place) == rank
    assert all(0 <= index < size for index, size in zip(place, topology.sizes, strict=True))


@given(TOPOLOGIES, st.sampled_from(AXES))
def test_the_groups_of_an_axis_divide_the_ranks(topology, axis):
    groups = {topology.group(rank, axis) for rank in range(topology.num_ranks)}
    assert sorted(rank for group in groups for rank in group) == list(range(topology.num_ranks))
    assert {len(group) for group in groups} == {getattr(topology, axis)}


def test_tokens_are_spread_over_neighbours():
    assert Topology(stage=2, guidance=2, seq=4).group(5, "seq") == (4, 5, 6, 7)


@given(st.integers(1, 64), st.sampled_from([1, 2]), st.integers(1, 50))
def test_a_chosen_mesh_fits(num_ranks, branches, in_flight):
    work = Workload(1000, in_flight, num_layers=8, num_heads=4, branches=branches)
    try:
        topology = choose_topology(num_ranks, MeshSettings(), work)
    except InputError:
        assert not any(
            stage * guidance * seq == num_ranks
            for stage in range(1, 9)
            for guidance in range(1, branches + 1)
            for seq in (1, 2, 4)
        )
        return
    assert math.prod(topology.sizes) == num_ranks
    assert topology.stage <= 8 and topology.guidance <= branches and 4 % topology.ulysses == 0


def test_a_deep_queue_is_split_by_layers_and_a_shallow_one_by_branches_and_tokens():
    assert choose_topology(4, MeshSettings(), WORK).stage == 4
    shallow = Workload(1000, in_flight=1, num_layers=8, num_heads=4, branches=2)
    topology = choose_topology(8, MeshSettings(), shallow)
    assert (topology.stage, topology.guidance, topology.seq) == (1, 2, 4) or topology.stage == 2
    assert predicted_time(topology, shallow) <= predicted_time(Topology(stage=8), shallow)


@pytest.mark.parametrize(
    ("num_ranks", "mesh", "message"),
    [
        (3, {"stage": 2, "guidance": 1, "seq": 1}, r"no whole numbers solve .*stage 2.* = 3 ranks"),
        (3, dict.fromkeys(AXES, 1), r"replica 1 x stage 1 .* = 1 ranks, but 3 were started"),
        (9, {"stage": 9}, "the model has 8 layers"),
        (2, {"guidance": 2}, "one branch without guidance"),
        (3, {"seq": 3}, r"seq 3 / ring 1 = 3 does not divide the model's 4 heads: raise mesh.ring"),
        (2, {"replica": 2}, "a render is one film"),
        (2, {"chunk": 2}, "one chunk is at a step"),
        (2, {"seq": 2, "ring": 4}, "seq 2 is not a multiple of ring 4"),
    ],
)
def test_what_does_not_fit_is_told_with_its_equation(num_ranks, mesh, message):
    with pytest.raises(InputError, match=message):
        choose_topology(num_ranks, MeshSettings(**mesh), WORK)


def test_a_ring_takes_what_the_heads_cannot():
    topology = choose_topology(6, MeshSettings(seq=6, ring=3), WORK)
    assert (topology.ulysses, topology.ring) == (2, 3)
