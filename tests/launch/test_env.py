"""The rank of a process, from the variables of launchers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.launch.env import Launcher, RankEnv, Rendezvous, rank_of

MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
NAMES: dict[Launcher, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
SLURM_BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@st.composite
def places(draw: Any, min_nodes: int = 1) -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, of nodes with equally many ranks."""
    nodes, per_node = draw(st.integers(min_nodes, 5)), draw(st.integers(2, 9))
    node, local = draw(st.integers(0, nodes - 1)), draw(st.integers(0, per_node - 1))
    return node * per_node + local, nodes * per_node, local, per_node


def variables(launcher: Launcher, place: tuple[int, int, int, int]) -> dict[str, str]:
    if launcher == "slurm":
        rank, world_size, local_rank, per_node = place
        return {
            **SLURM_BATCH,
            "SLURM_NTASKS": str(world_size),
            "SLURM_STEP_NUM_TASKS": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(local_rank),
            "SLURM_NODEID": str(rank // per_node),
            "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{world_size // per_node})",
        }
    nodes = {"CROSS_RANK": "0", "CROSS_SIZE": str(place[1] // place[3])} if launcher == "deepspeed" else {}
    return {**dict(zip(NAMES[launcher], map(str, place), strict=True)), **nodes}


def test_a_process_without_a_launcher_has_no_rank() -> None:
    assert rank_of({"PATH": "/bin", **MEETING}) is None


@given(st.sampled_from([*NAMES, "slurm"]), places())
def test_every_launcher_says_its_place(launcher: Launcher, place: tuple[int, int, int, int]) -> None:
    found = rank_of({**variables(launcher, place), **MEETING})
    assert found == RankEnv(*place, launcher, Rendezvous("node7", 29500))
    # What torch is told of it is read back the same.
    assert rank_of(found.variables()) == RankEnv(*place, "torchrun", Rendezvous("node7", 29500))


@given(places())
def test_our_own_supervisor_and_torchrun_hold_inside_other_launchers(place: tuple[int, int, int, int]) -> None:
    outer = {**variables("slurm", (1, 4, 1, 2)), **variables("openmpi", (0, 2, 0, 2))}
    inner = {**outer, **variables("torchrun", place), **MEETING, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    hosted = Rendezvous("node7", 29500, is_hosted=True)
    restarted = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert rank_of({**inner, **restarted}) == RankEnv(*place, "torchrun", Rendezvous("node7", 29500, True, attempt=2))
    assert rank_of({**inner, "LONGVID_SUPERVISOR": "41"}) == RankEnv(*place, "local", hosted, supervisor=41)
    seated = {**inner, "LONGVID_SUPERVISOR": "41", "LONGVID_SEAT": "1", "LONGVID_LISTENER": "5", "LONGVID_WIRE": "6"}
    meeting = replace(hosted, listener=None if place[0] else 5)
    assert rank_of(seated) == RankEnv(*place, "ray", meeting, supervisor=41, wire=6)


@given(places(), places())
def test_slurm_around_mpirun_does_not_matter(
    place: tuple[int, int, int, int], outer: tuple[int, int, int, int]
) -> None:
    found = rank_of({**variables("slurm", outer), **variables("mpich", place), **MEETING})
    assert found == RankEnv(*place, "mpich", Rendezvous("node7", 29500))


def test_what_pmi_does_not_say_is_taken_from_slurm() -> None:
    pmi = {"PMI_RANK": "5", "PMI_SIZE": "8"}
    found = rank_of({**variables("slurm", (5, 8, 1, 4)), **pmi, **MEETING})
    assert found and (found.rank, found.local_rank, found.local_world_size) == (5, 1, 4)


def test_tasks_may_differ_between_nodes() -> None:
    step = {**variables("slurm", (6, 7, 0, 7)), "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}
    found = rank_of({**step, **MEETING})
    assert found and found.local_world_size == 1


def test_a_batch_script_and_a_step_of_one_task_are_plain_processes() -> None:
    assert rank_of(SLURM_BATCH) is None
    assert rank_of({**SLURM_BATCH, "SLURM_STEP_NUM_TASKS": "1"}) is None


@given(st.sampled_from(["openmpi", "mpich", "slurm"]), places(), places())
def test_launchers_that_disagree_are_named(
    launcher: Launcher, ours: tuple[int, int, int, int], theirs: tuple[int, int, int, int]
) -> None:
    environ = {**variables("torchrun", ours), **variables(launcher, theirs), **MEETING}
    if ours[:2] == theirs[:2]:
        assert rank_of(environ)
        return
    with pytest.raises(InputError) as error:
        rank_of(environ)
    name = "SLURM_PROCID" if launcher == "slurm" else NAMES[launcher][0]
    assert f"RANK={ours[0]} and WORLD_SIZE={ours[1]}" in str(error.value)
    assert f"{name}={theirs[0]}" in str(error.value)


@given(st.sampled_from(list(NAMES)), places(), st.integers(0, 2))
def test_a_variable_that_is_missing_is_named(
    launcher: Launcher, place: tuple[int, int, int, int], missing: int
) -> None:
    environ = {**variables(launcher, place), **MEETING}
    del environ[NAMES[launcher][missing]]
    with pytest.raises(InputError, match=rf"\b{NAMES[launcher][missing]} is not set"):
        rank_of(environ)


@given(places(), st.sampled_from(["-1", "two", "", "1.0", "1_0", "²", "9" * 30]), st.integers(0, 3))
def test_what_is_no_number_is_named(place: tuple[int, int, int, int], text: str, which: int) -> None:
    name = NAMES["torchrun"][which]
    with pytest.raises(InputError, match=rf"^{name}='"):
        rank_of({**variables("torchrun", place), **MEETING, name: text})


@pytest.mark.parametrize("place", [(4, 4, 0, 4), (0, 4, 4, 4), (0, 4, 2, 2), (0, 2, 0, 4)])
def test_numbers_that_do_not_fit_each_other_are_refused(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match=r"RANK=|local rank"):
        rank_of({**variables("torchrun", place), **MEETING})


@given(st.sampled_from([*NAMES, "slurm"]), places(min_nodes=2))
def test_several_ranks_need_a_place_to_meet(launcher: Launcher, place: tuple[int, int, int, int]) -> None:
    environ = variables(launcher, place)
    if launcher in ("openmpi", "mpich"):
        assert rank_of(environ) == RankEnv(*place, launcher)  # over MPI
    else:
        with pytest.raises(InputError, match=r"MASTER_ADDR and MASTER_PORT are not set.*MASTER_PORT=29500"):
            rank_of(environ)
    with pytest.raises(InputError, match="MASTER_PORT is not set, but MASTER_ADDR is"):
        rank_of({**environ, "MASTER_ADDR": "node7"})
    with pytest.raises(InputError, match="MASTER_PORT=70000 must be"):
        rank_of({**environ, **MEETING, "MASTER_PORT": "70000"})


def test_slurm_meets_on_the_first_node_of_the_step_and_each_step_on_a_port_of_its_own() -> None:
    step = {**variables("slurm", (5, 8, 1, 4)), "SLURM_JOB_NODELIST": "gpu[01-09]", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    found, next_step = (rank_of({**step, "SLURM_STEP_ID": number}) for number in "01")
    assert found and found.rendezvous and found.rendezvous.host == "gpu03" and not found.is_one_machine
    assert next_step and next_step.rendezvous and 1024 < found.rendezvous.port < next_step.rendezvous.port < 32768
    # PMI beside Slurm needs no MPI, and what the user says holds.
    with_pmi = rank_of({**step, "SLURM_STEP_ID": "0", "PMI_RANK": "5", "PMI_SIZE": "8"})
    assert with_pmi and with_pmi.rendezvous == found.rendezvous
    assert (chosen := rank_of({**step, **MEETING})) and chosen.rendezvous == Rendezvous("node7", 29500)


def test_the_network_interface_is_the_users_choice() -> None:
    found = rank_of({**variables("torchrun", (0, 2, 0, 2)), **MEETING, "GLOO_SOCKET_IFNAME": "ib0"})
    assert found and found.interface == "ib0" and found.variables()["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_mesh_that_does_not_fit_what_was_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from longvid.models.facts import configs_of, facts_of
    from longvid.ranks import join_mesh
    from longvid.settings import load_settings

    for name, value in {**variables("torchrun", (0, 3, 0, 3)), **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"stage 2 .* = 3 ranks; the launcher started 3 \(WORLD_SIZE=3\)"):
        settings = load_settings(None, ["mesh.stage=2", "mesh.seq=1", "mesh.guidance=1"])
        join_mesh(settings, facts_of("mini"), configs_of("mini"))


def test_a_lone_rank_needs_nothing_more() -> None:
    assert rank_of({"RANK": "0", "WORLD_SIZE": "1"}) == RankEnv(0, 1, 0, 1, "torchrun")
    assert rank_of(variables("openmpi", (0, 1, 0, 1))) == RankEnv(0, 1, 0, 1, "openmpi")


KNOWN = sorted({*MEETING, *SLURM_BATCH, *(name for names in NAMES.values() for name in names)})
KNOWN += ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "TORCHELASTIC_RUN_ID", "LONGVID_SUPERVISOR"]
TEXTS = st.sampled_from(["0", "1", "2", "4", "8", "2(x3),1", "2(x", "", "x", "-1"])


@given(st.dictionaries(st.sampled_from(KNOWN), TEXTS, max_size=12))
def test_any_environment_gives_a_place_that_fits_or_an_error(environ: dict[str, str]) -> None:
    try:
        found = rank_of(environ)
    except InputError:
        return
    if found is not None:
        assert 0 <= found.local_rank < found.local_world_size <= found.world_size
        assert 0 <= found.rank < found.world_size
        assert found.world_size == 1 or found.rendezvous or found.launcher in ("openmpi", "mpich", "torchrun")
