"""`longvid plan --gpu`: meshes, times and memory of accelerators that are not here."""

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from longvid.chips import CHIPS, find_chip
from longvid.cli import app
from longvid.machines import ChipMachine, MeasuredMachine
from longvid.measured import measure_machine
from longvid.models.facts import facts_of, sizes_of, weight_bytes
from longvid.models.known import KNOWN, known_configs
from longvid.models.parts import ModelPart
from longvid.models.sizes import Tokens
from longvid.outlook import Film, options
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


def test_every_way_to_spread_the_ranks_is_there_and_the_fastest_that_fits_is_best(eight):
    meshes = [tuple(option["mesh"][axis] for axis in ("stage", "guidance", "seq")) for option in eight["options"]]
    assert len(set(meshes)) == len(meshes) == 10 and all(math.prod(mesh) == 8 for mesh in meshes)
    fitting = [option for option in eight["options"] if option["reason"] is None]
    assert eight["best"] == min(fitting, key=lambda option: option["seconds"])
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
        assert stages[0]["text_mb"] == 2 * sizes.text_params / 1e6
        assert all(stage["text_mb"] == 0 for stage in stages[1:])
        assert stages[0]["vae_mb"] > 0 and {stage["vae_mb"] for stage in stages} <= {0, stages[0]["vae_mb"]}
        assert option["worst_mb"] == max(sum(stage.values()) for stage in stages)


def test_what_does_not_fit_says_what_would_and_that_does(minute):
    small = [minute, *WAN, "--gpu", "rtx4090-24g", "--gpus", 4]
    text = plan(*small).stdout
    assert "does not fit" in text and "would hold" in text
    found = outlook_of(*small)
    assert not found["fits"] and found["best"] is None
    larger = next(remedy for remedy in found["remedies"] if remedy.startswith("--gpu"))
    assert outlook_of(minute, *WAN, *larger.split(), "--gpus", 4)["fits"]
    more = next(remedy for remedy in found["remedies"] if remedy.endswith("of them"))
    assert outlook_of(minute, *WAN, "--gpu", "rtx4090-24g", "--gpus", more.split()[0])["fits"]


def test_settings_that_would_make_it_fit_do(minute):
    large = [minute, *WAN, "--gpu", "h100-80g", "--gpus", 1]
    found = outlook_of(*large)
    assert not found["fits"]
    changes = [remedy for remedy in found["remedies"] if remedy.startswith("--set")]
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
    if model.startswith(("Cog", "LTX")):
        assert all(o["reason"] for o in found["options"] if o["mesh"]["seq"] > 1)


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
    assert machine.decode(film.cells, machine.latents, starts=False) == pytest.approx(machine.costs.decode)
    [option] = options(film, machine, 1)
    assert option.pace and 0 < option.pace.first <= option.pace.makespan
    assert option.memory[0].total_mb < 50
