"""`longvid plan --gpu`: meshes, times and memory of accelerators that are not here."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from longvid.chips import CHIPS, CPU, UNKNOWN, chip_here, chip_of, find_chip
from longvid.cli import app
from longvid.machines import ChipMachine, MeasuredMachine
from longvid.measured import measure_machine
from longvid.meshes import Film, choose_mesh, long_film, options
from longvid.models.facts import facts_of, sizes_of, weight_bytes
from longvid.models.known import KNOWN, known_configs
from longvid.models.parts import ModelPart
from longvid.models.sizes import Tokens
from longvid.parallel.topology import Topology
from longvid.plan import make_plan
from longvid.script import parse_script
from longvid.settings import load_settings

WAN = ["--model", "Wan2.1-T2V-14B", "--preset", "wan"]


def story_of(seconds):
    return f'scenes:\n  - {{prompt: "a ship", for: {seconds}s}}\n'


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    path = tmp_path_factory.mktemp("outlook") / "minute.yaml"
    path.write_text(story_of(60))
    return path


@pytest.fixture(scope="module")
def moment(tmp_path_factory):
    path = tmp_path_factory.mktemp("outlook") / "moment.yaml"
    path.write_text(story_of(5))
    return path


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def outlook_of(*arguments):
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def film_of(seconds=60, model="Wan2.1-T2V-14B", overrides=(), preset="wan"):
    settings = load_settings(preset, [*overrides, f"model.path={model}"])
    facts = facts_of(model)
    made = make_plan(parse_script(story_of(seconds), "story.yaml"), settings, facts)
    return Film(made, settings, facts, sizes_of(model))


@pytest.fixture(scope="module")
def eight(minute):
    return outlook_of(minute, *WAN, "--gpu", "h100-80g", "--gpus", 8)


def test_every_way_to_spread_the_ranks_is_there_and_of_the_fastest_that_which_holds_least_is_best(eight):
    meshes = [tuple(option["mesh"][axis] for axis in ("stage", "guidance", "seq")) for option in eight["options"]]
    assert len(set(meshes)) == len(meshes) == 10 and all(math.prod(mesh) == 8 for mesh in meshes)
    fitting = [option for option in eight["options"] if option["reason"] is None]
    close = [option for option in fitting if option["seconds"] <= 1.02 * min(o["seconds"] for o in fitting)]
    assert eight["best"] == eight["options"][0] == min(close, key=lambda option: option["worst_mb"])
    assert len(close) < len(fitting)
    refused = [option["reason"] for option in eight["options"] if option["mesh"]["guidance"] > 2]
    assert refused and all("there is only 2 branches" in reason for reason in refused)


def test_no_mesh_is_faster_than_its_work(eight):
    chip = find_chip("h100-80g")
    least = eight["pflops"] * 1e15 / (8 * chip.tflops * 1e12 * chip.attained)
    for option in eight["options"]:
        if option["reason"] is None:
            assert least < option["seconds"] < 1.5 * least
            assert option["first_frames_s"] < option["seconds"]


def test_ranks_hold_their_layers_and_the_leader_what_it_alone_has(eight):
    sizes = sizes_of("Wan2.1-T2V-14B")
    for option in eight["options"]:
        if option["reason"] is not None:
            continue
        bounds, stages = option["layers"], option["memory"]
        assert [bounds[0][0], bounds[-1][1]] == [0, 40]
        parts = [ModelPart(range(*span), span[0] == 0, span[1] == 40) for span in bounds]
        assert [stage["weights_mb"] for stage in stages] == [2 * sizes.part_params(part) / 1e6 for part in parts]
        assert stages[0]["text_mb"] == 0  # it goes before the film begins, which takes more than it did
        assert all(stage["text_mb"] == 0 for stage in stages[1:])
        assert option["worst_mb"] == max(sum(stage.values()) for stage in stages)


def test_the_vae_is_held_where_it_decodes():
    for who in ("leader", "stages"):
        film = film_of(20, overrides=["mesh.stage=4", "mesh.guidance=2", f"mesh.decode={who}"])
        [option] = [o for o in options(film, ChipMachine(find_chip("h100-80g"), film.sizes, 2), 8) if not o.reason]
        held = [stage.vae_mb > 0 for stage in option.memory]
        parts = [part > 0 for part in option.shares.of_stages] if option.shares else [True, False, False, False]
        assert held == parts and (option.shares is None) == (who == "leader")


def test_what_does_not_fit_says_what_would_and_that_does(moment):
    small = [moment, *WAN, "--gpu", "rtx4090-24g", "--gpus", 4]
    text = plan(*small).stdout
    assert "does not fit" in text and "would hold" in text
    found = outlook_of(*small)
    assert not found["fits"] and found["best"] is None
    changes = [remedy["change"] for remedy in found["remedies"]]
    larger = next(change for change in changes if change.startswith("--gpu"))
    assert outlook_of(moment, *WAN, *larger.split(), "--gpus", 4)["fits"]
    more = next(change for change in changes if change.endswith("of them"))
    assert outlook_of(moment, *WAN, "--gpu", "rtx4090-24g", "--gpus", more.split()[0])["fits"]


def test_settings_that_would_make_it_fit_do(minute):
    large = [minute, *WAN, "--gpu", "l40s-48g", "--gpus", 1]
    found = outlook_of(*large)
    assert not found["fits"]
    changes = [r["change"] for r in found["remedies"] if r["change"].startswith("--set queue")]
    assert changes
    for change in changes:
        assert outlook_of(*large, *change.split())["fits"]


def test_a_long_film_takes_longer_by_what_its_chunks_add():
    chip = find_chip("h200-141g")
    pace = {}
    for hours in (1, 2):
        film = film_of(3600 * hours)
        machine = ChipMachine(chip, film.sizes, 2)
        [pace[hours]] = [o.pace for o in options(film, machine, 8) if o.topology == Topology(stage=8)]
    added = pace[2].makespan - pace[1].makespan
    assert 0.9 * pace[1].makespan < added < pace[1].makespan
    assert pace[1].first == pace[2].first


def test_configs_without_weights_are_planned_as_the_known_model_is(minute, tmp_path, eight):
    configs = known_configs("Wan2.1-T2V-14B")
    (tmp_path / "model_index.json").write_text(json.dumps(configs.index))
    (tmp_path / "longvid.json").write_text(json.dumps(configs.extra))
    for part, config in configs.loaded.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    arguments = ["--model", tmp_path, "--preset", "wan", "--gpu", "h100-80g", "--gpus", 8]
    assert {**outlook_of(minute, *arguments), "model": eight["model"]} == eight


def test_bytes_by_configs_are_those_of_the_files(tiny_model):
    sizes = sizes_of(str(tiny_model))
    for part in (ModelPart(range(2)), ModelPart(range(1), is_last=False), ModelPart(range(1, 2), is_first=False)):
        assert 4 * sizes.part_params(part) == weight_bytes(str(tiny_model), part, 4)


def test_both_experts_are_held():
    one, two = (sizes_of(name) for name in ("Wan2.1-T2V-14B", "Wan2.2-T2V-A14B"))
    assert two.part_params(ModelPart(range(40))) == 2 * one.part_params(ModelPart(range(40)))


@pytest.mark.parametrize("model", [name for name in KNOWN if name != "HunyuanVideo"])
def test_every_known_model_that_can_run_is_planned(minute, model):
    arguments = ["--model", model, "--gpu", "b200-180g", "--gpus", 4, "--set", "runtime.dtype=bfloat16"]
    found = outlook_of(minute, *arguments)
    assert found["fits"] and found["pflops"] > 0
    assert any(not o["reason"] for o in found["options"] if o["mesh"]["seq"] > 1)


def test_planning_loads_no_torch(minute):
    code = (
        "import sys; from longvid.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-P", "-c", code, "plan", str(minute), *WAN, "--gpu", "h100-80g", "--gpus", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"] and "best" in done.stdout


def test_a_wrong_chip_is_named_with_the_nearest_and_a_known_model_cannot_be_rendered(minute, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wrong = plan(minute, *WAN, "--gpu", "h100")
    assert wrong.exit_code == 2 and "'h100-80g'" in wrong.stderr
    both = plan(minute, "--gpu", "h100-80g", "--measure")
    assert both.exit_code == 2 and "give one of them" in both.stderr
    film = ["render", str(minute), "-o", str(tmp_path / "film.mp4"), *WAN]
    render = CliRunner().invoke(app, film)
    assert render.exit_code == 2 and "is not in the local cache" in render.stderr


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_more_ranks_a_sequence_are_faster_and_cost_their_exchange(chip):
    sizes = sizes_of("Wan2.1-T2V-14B")
    machine, layer, tokens = ChipMachine(chip, sizes, 2), sizes.layers[0], Tokens(40000, 50000, 512)
    one, two, ring = (machine.layer(layer, tokens, t) for t in (Topology(), Topology(seq=2), Topology(seq=2, ring=2)))
    assert one / 2 < two < one and one / 2 < ring < one


def test_this_machine_is_measured_at_the_films_own_size(tiny_model):
    film = film_of(4, str(tiny_model), ["sampler.steps=2"], preset=None)
    machine = measure_machine(film, 1)
    assert isinstance(machine, MeasuredMachine)
    layer, one = film.sizes.layers[0], Topology()
    assert machine.layer(layer, machine.unit, one) == pytest.approx(machine.costs.layers[0])
    assert machine.decode(film.cells, machine.work, starts=False) == pytest.approx(machine.costs.decode)
    [option] = options(film, machine, 1)
    assert option.pace and 0 < option.pace.first <= option.pace.makespan
    assert option.memory[0].total_mb < 50


def test_ranks_are_measured_all_at_once_with_their_messages(tiny_model):
    film = film_of(4, str(tiny_model), ["sampler.steps=2", "runtime.threads=1"], preset=None)
    machine = measure_machine(film, 2)
    assert machine.costs.layers[0] > 0 and machine.unit_s > 0 and machine.message_s > 0 and machine.loopback_gb > 0
    two = machine.overhead(Topology(stage=2))
    assert machine.overhead(Topology()) == machine.unit_s and two == machine.unit_s + machine.message_s
    silent = replace(machine, unit_s=0.0, message_s=0.0)
    [counted], [free] = (
        [option.pace for option in options(film, each, 2) if option.topology.stage == 2] for each in (machine, silent)
    )
    units = len(film.plan.chunks) * film.steps
    assert sum(counted.busy) == pytest.approx(sum(free.busy) + 2 * units * two)


# ------------------------------------------------------------------------------------------------------ memory settings


ONE = Topology()


def lone(*overrides, model="Wan2.1-T2V-14B", chip="h200-141g"):
    """A film on a single chip: its only mesh."""
    film = film_of(20, model, overrides)
    film = replace(film, sizes=film.sizes.held(film.settings.memory.quantize))
    [option] = options(film, ChipMachine(find_chip(chip), film.sizes, film.itemsize), 1)
    return option


def test_a_text_encoder_that_is_kept_counts_beside_the_film_and_one_that_is_freed_as_far_as_it_is_more():
    kept, freed = lone("memory.text_encoder=keep"), lone("memory.text_encoder=free", "memory.offload=host")
    text = 2 * sizes_of("Wan2.1-T2V-14B").text_params / 1e6
    assert kept.memory[0].text_mb == text
    assert lone("memory.text_encoder=free").memory[0].text_mb == lone().memory[0].text_mb == 0
    rest = replace(freed.memory[0], text_mb=0).total_mb
    assert freed.memory[0].total_mb == max(rest, freed.memory[0].weights_mb + text + 2 * VAE_PARAMS / 1e6)


VAE_PARAMS = sizes_of("Wan2.1-T2V-14B").vae.params


@pytest.mark.parametrize("group", [1, 3, 20, 40])
def test_offloaded_layers_are_on_the_device_by_two_groups_and_take_their_way_there(group):
    sizes, chip = sizes_of("Wan2.1-T2V-14B"), find_chip("h200-141g")
    whole, away = lone(), lone("memory.offload=host", f"memory.group={group}")
    layer = 2 * sizes.layers[0].params / 1e6
    assert whole.memory[0].weights_mb - away.memory[0].weights_mb == pytest.approx(layer * (40 - min(40, 2 * group)))
    # A pass takes what its copies take, if that is more than computing; a single group never goes.
    film = film_of(20)
    passes = film.steps * len(film.plan.chunks) * 2
    least = 0 if group == 40 else passes * 40 * layer * 1e6 / (chip.host * 1e9)
    assert away.seconds >= max(whole.seconds, least)
    assert group != 40 or away.seconds == whole.seconds


def test_a_disk_is_slower_than_host_memory():
    times = [lone(f"memory.offload={place}").seconds for place in ("host", "disk")]
    assert times[0] < times[1]


def test_eight_bits_halve_the_linear_weights_and_only_activations_in_8_bits_make_it_faster():
    whole = lone()
    found = {how: lone(f"memory.quantize={how}") for how in ("int8", "fp8", "w8a8")}
    sizes = sizes_of("Wan2.1-T2V-14B")
    saved = 38 * sizes.layers[0].linear_params / 1e6  # not of the first and the last layer
    for option in found.values():
        assert whole.memory[0].weights_mb - option.memory[0].weights_mb == pytest.approx(saved)
    assert found["int8"].seconds == found["fp8"].seconds == whole.seconds
    assert whole.seconds / 2 < found["w8a8"].seconds < whole.seconds


def test_fewer_rows_at_a_time_take_less_for_decoding():
    works = [lone(f"memory.vae_rows={rows}", "queue.chunk_latents=1", "queue.context_latents=0") for rows in (0, 30, 4)]
    held = [option.memory[0].activations_mb for option in works]
    assert held[0] > held[1] > held[2]
    assert len({option.memory[0].vae_mb for option in works}) == 1


def test_what_does_not_fit_names_the_setting_of_memory_that_would_with_its_figure(moment):
    tight = [moment, *WAN, "--gpu", "rtx4090-24g", "--gpus", 4]
    remedies = [remedy for remedy in outlook_of(*tight)["remedies"] if "--set memory" in remedy["change"]]
    assert remedies
    for remedy in remedies:
        found = outlook_of(*tight, *remedy["change"].split())
        held = min(option["worst_mb"] for option in found["options"] if option["reason"] is None)
        assert found["fits"] and remedy["held_gb"] == pytest.approx(held / 1e3) and held / 1e3 <= remedy["memory_gb"]
    assert remedies[0]["change"] in plan(*tight).stdout


def test_what_a_family_cannot_do_is_no_remedy(minute):
    found = outlook_of(minute, "--model", "CogVideoX-5b", "--gpu", "rtx4090-24g", "--preset", "wan")
    assert found["remedies"] and not any("vae_rows" in remedy["change"] for remedy in found["remedies"])


# ------------------------------------------------------------------------------------------- what a render takes itself


@pytest.mark.parametrize("chip", ["h100-80g", "rtx4090-24g"])
@pytest.mark.parametrize("num_ranks", [2, 6, 8])
def test_a_render_takes_the_mesh_that_the_plan_of_a_long_film_puts_first(num_ranks, chip):
    settings = load_settings("wan", ["model.path=Wan2.1-T2V-1.3B"])
    facts, sizes = facts_of("Wan2.1-T2V-1.3B"), sizes_of("Wan2.1-T2V-1.3B")
    film = long_film(settings, facts, sizes)
    first, *_ = options(film, ChipMachine(find_chip(chip), sizes, 2), num_ranks)
    assert choose_mesh(num_ranks, settings, facts, sizes, find_chip(chip)) == first.topology


def test_the_plan_says_what_a_render_takes(minute):
    settings = load_settings("wan", ["model.path=Wan2.1-T2V-14B"])
    taken = choose_mesh(8, settings, facts_of("Wan2.1-T2V-14B"), sizes_of("Wan2.1-T2V-14B"), find_chip("h100-80g"))
    axes = dict(zip(("replica", "stage", "chunk", "guidance", "seq"), taken.sizes, strict=True))
    assert outlook_of(minute, *WAN, "--gpu", "h100-80g", "--gpus", 8)["taken"] == axes | {"ring": 1}
    mini = load_settings(None, ["runtime.device=cpu"])
    here = json.loads(plan(minute, "--ranks", 4, "--set", "runtime.device=cpu", "--json").stdout)["mesh"]
    chosen = choose_mesh(4, mini, facts_of("mini"), sizes_of("mini"), CPU)
    assert tuple(here.values()) == chosen.sizes


def test_what_a_render_refuses_for_want_of_a_ring_is_planned_with_one(moment):
    film = [moment, "--model", "Wan2.1-T2V-1.3B", "--preset", "wan", "--gpu", "h100-80g", "--gpus", 8]
    found = outlook_of(*film, "--set", "mesh.seq=8", "--set", "mesh.stage=1")
    assert found["taken"] is None and 12 % (8 // found["best"]["mesh"]["ring"]) == 0


def test_a_fixed_mesh_is_taken_and_a_queue_on_cpus_is_split_by_layers():
    facts, sizes = facts_of("mini"), sizes_of("mini")
    for count in (2, 4):
        assert choose_mesh(count, load_settings(), facts, sizes, CPU) == Topology(stage=count)
    fixed = load_settings(None, ["mesh.stage=1", "mesh.seq=2"])
    assert choose_mesh(2, fixed, facts, sizes, CPU) == Topology(seq=2)
    whole = load_settings(None, ["schedule=sequential"])
    assert choose_mesh(2, whole, facts, sizes, find_chip("h100-80g")) == Topology(seq=2)  # one unit is in flight


def test_chips_are_known_by_what_the_driver_calls_them(tmp_path):
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090", "NVIDIA L40S", "NVIDIA B200")
    found = [chip_of(name).name for name in names]
    assert found == ["h100-80g", "a100-40g", "rtx4090-24g", "l40s-48g", "b200-180g"]
    assert chip_of("NVIDIA H100 PCIe") == UNKNOWN
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA H200\nIRQ: 1\n")
    assert chip_here(load_settings(), tmp_path).name == "h200-141g"
    assert chip_here(load_settings(None, ["runtime.device=cpu"]), tmp_path) == CPU
    assert chip_here(load_settings(), tmp_path / "none") == CPU
