"""LoRAs beside stock diffusers and peft on the same files; and those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from longvid.cli import app
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.manifest import MANIFEST, state_folder
from longvid.models.checkpoint import StageOptions
from longvid.models.loader import open_checkpoint, open_loading
from longvid.models.parts import ModelPart
from longvid.options import all_overrides
from longvid.script import parse_script
from longvid.settings import load_settings

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")
STEPS, WEIGHT = 3, 0.7
STORY = 'seed: 3\nsize: [32, 48]\nscenes:\n  - {prompt: "a red circle moving left", for: 9f}\n'
MODULES = ["attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2"]
ORIGINAL = ["self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0", "ffn.2"]


def random_lora(dit: Any, modules: list[str], rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices down and up of modules of a transformer, large enough to matter."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name in modules:
        out, *rest = dit.get_submodule(name).weight.shape
        found[name] = (
            torch.randn(rank, *rest, generator=generator) * 0.3,
            torch.randn(out, rank, generator=generator) * 0.3,
        )
    return found


def every_layer(names: list[str], layers: str = "blocks") -> list[str]:
    return [f"{layers}.{layer}.{name}" for layer in range(3) for name in names]


@pytest.fixture(scope="module")
def dit(euler_checkpoint: Path) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(euler_checkpoint / "transformer")


@pytest.fixture(scope="module")
def files(dit: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LoRA file in each format; they are not the same LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    lora = random_lora(dit, [*every_layer(MODULES), "condition_embedder.time_proj", "proj_out"])
    plain = {f"{name}.lora_{'AB'[i]}.weight": pair[i] for name, pair in lora.items() for i in (0, 1)}
    diffusers.WanPipeline.save_lora_weights(folder / "plain", transformer_lora_layers=plain)
    diffusers.WanPipeline.save_lora_weights(
        folder / "scaled",
        transformer_lora_layers=plain,
        transformer_lora_adapter_metadata={
            "r": 4,
            "lora_alpha": 6,
            "target_modules": list(lora),
            "alpha_pattern": {"attn1.to_q": 2},
        },
    )
    original: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        for ours, theirs in zip(MODULES, ORIGINAL, strict=True):
            name = name.replace(ours, theirs) if name.startswith("blocks") else name
        name = name.replace("condition_embedder.time_proj", "time_projection.1").replace("proj_out", "head.head")
        original |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        original[f"{name}.diff_b"] = torch.linspace(-0.1, 0.1, len(up))
        if name.startswith("blocks"):
            original[f"{name}.alpha"] = torch.tensor(2.0)
    original["blocks.0.norm3.diff"] = torch.zeros(24)
    save_file({f"diffusion_model.{name}": value for name, value in original.items()}, folder / "original.safetensors")
    kohya = {}
    for layer in range(3):
        every = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"]
        every += [name.replace("self", "cross") for name in every] + ["ffn.0", "ffn.2"]
        for name in every:
            shape = (32, 24) if name == "ffn.0" else (24, 32) if name == "ffn.2" else (24, 24)
            key = f"lora_unet_blocks_{layer}_{name.replace('.', '_')}"
            kohya[f"{key}.lora_down.weight"] = torch.full((4, shape[1]), 0.1 * (layer + 1))
            kohya[f"{key}.lora_up.weight"] = torch.linspace(-1, 1, 4 * shape[0]).view(shape[0], 4)
            kohya[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(kohya, folder / "kohya.safetensors")
    names = {kind: folder / kind / "pytorch_lora_weights.safetensors" for kind in ("plain", "scaled")}
    return names | {kind: folder / f"{kind}.safetensors" for kind in ("original", "kohya")}


def latents_of(checkpoint: Path, *overrides: str) -> tuple[Engine, Tensor]:
    engine = Engine.load(checkpoint, overrides=["schedule=sequential", f"sampler.steps={STEPS}", *overrides])
    (finished,) = engine.denoise(engine.plan(parse_script(STORY, "story.yaml")))
    return engine, finished.latents


def stock_latents(pipe: Any, engine: Engine) -> Tensor:
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        prompt=plan.prompts[0],
        width=plan.width,
        height=plan.height,
        num_frames=plan.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=engine._noise(plan)(plan.chunks[0])[None],
        output_type="latent",
    )
    latents: Tensor = result.frames[0]
    return latents


@pytest.mark.parametrize("kind", ["plain", "scaled", "original", "kohya"])
def test_a_render_is_that_of_the_stock_pipeline(kind: str, files: dict[str, Path], euler_checkpoint: Path) -> None:
    engine, found = latents_of(euler_checkpoint, *all_overrides(None, None, [f"{files[kind]}:{WEIGHT}"]))
    pipe = diffusers.WanPipeline.from_pretrained(euler_checkpoint)
    without = stock_latents(pipe, engine)
    pipe.load_lora_weights(str(files[kind]), adapter_name="ours")
    pipe.set_adapters("ours", WEIGHT)
    expected = stock_latents(pipe, engine)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - without).abs().max() >= 1e-3


def test_two_loras_of_different_weights_add_up(files: dict[str, Path], euler_checkpoint: Path) -> None:
    chosen = [f"{files['plain']}:0.5", f"{files['kohya']}:-0.25"]
    engine, found = latents_of(euler_checkpoint, *all_overrides(None, None, chosen))
    pipe = diffusers.WanPipeline.from_pretrained(euler_checkpoint)
    for kind in ("plain", "kohya"):
        pipe.load_lora_weights(str(files[kind]), adapter_name=kind)
    pipe.set_adapters(["plain", "kohya"], [0.5, -0.25])
    assert (found - stock_latents(pipe, engine)).abs().max() <= 1e-5


def test_an_adapter_as_peft_saves_it(euler_checkpoint: Path, tmp_path: Path) -> None:
    """With a scale of its own, rank-stabilised, and a bias."""
    dit = diffusers.WanTransformer3DModel.from_pretrained(euler_checkpoint / "transformer")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"attn2.to_k": 2},
        target_modules=["to_q", "to_k"],
        init_lora_weights=False,
        lora_bias=True,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(dit, config)
    model.save_pretrained(tmp_path / "adapter")
    part = loaded_part(euler_checkpoint, [{"path": str(tmp_path / "adapter")}])
    assert_same_weights(part, model.merge_and_unload())


def loaded_part(root: Path, loras: list[dict[str, Any]], name: str = "dit", part: ModelPart | None = None) -> Any:
    """A transformer as a stage has it."""
    settings = load_settings(None, [f"model.lora={json.dumps(loras)}", f"model.path={root}"])
    checkpoint = open_checkpoint(str(root))
    options = StageOptions(loading=open_loading(checkpoint, settings, CPU))
    part = part or ModelPart(range(checkpoint.facts.num_layers))
    stage: Any = checkpoint.load_stage(part, torch.float32, CPU, options)
    return stage.dit if hasattr(stage, "dit") else getattr(stage, name).dit


def assert_same_weights(ours: Any, stock: Any) -> None:
    expected = stock.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["ltx", "cogvideox 5b"])
def test_other_families_take_theirs(kind: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint_of(kind))
    lora = random_lora(pipe.transformer, every_layer(["attn1.to_q", "attn1.to_out.0"], "transformer_blocks"))
    tensors = {f"{name}.lora_{'AB'[i]}.weight": pair[i] for name, pair in lora.items() for i in (0, 1)}
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=tensors)
    (file,) = tmp_path.glob("*.safetensors")
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(lora_scale=WEIGHT)
    pipe.unload_lora_weights()
    assert_same_weights(loaded_part(checkpoint_of(kind), [{"path": str(file), "weight": WEIGHT}]), pipe.transformer)


@pytest.mark.parametrize(
    ("expert", "changed"), [("high", (True, False)), ("low", (False, True)), ("both", (True,) * 2)]
)
def test_an_expert_has_its_own(
    expert: str, changed: tuple[bool, bool], files: dict[str, Path], checkpoint_of: CheckpointOf
) -> None:
    root, lora = checkpoint_of("a14b"), [{"path": str(files["plain"]), "expert": expert}]
    for name, is_changed in zip(("_high", "_low"), changed, strict=True):
        with_it, without = (loaded_part(root, loras, name) for loras in (lora, []))
        assert torch.equal(with_it.proj_out.weight, without.proj_out.weight) != is_changed


def test_a_stage_reads_of_the_file_what_its_layers_need(
    files: dict[str, Path], euler_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longvid.models.lora as module

    read: list[str] = []
    stock = module.safe_open

    class Counting:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = stock(*args, **options)

        def __enter__(self) -> Counting:
            self._opened = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._opened.get_tensor(name)

    monkeypatch.setattr(module, "safe_open", Counting)
    loaded_part(euler_checkpoint, [{"path": str(files["plain"])}], part=ModelPart(range(1, 2), False, False))
    assert {name.split(".")[2] for name in read if ".blocks." in name} == {"1"}
    assert sorted(read) == sorted(set(read)) and not [name for name in read if "proj_out" in name]


def change(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in tensors.items()}


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: change(t, "blocks.2.", "blocks.7."), r"is for another model: .* has no module 'blocks.7.attn1"),
        (lambda t: change(t, "transformer.", "text_encoder."), "no module 'text_encoder.blocks.0"),
        (lambda t: {name: value[..., :5] for name, value in t.items()}, r"is for another model than .* is \[24, 24\]"),
        (lambda t: dict(list(t.items())[1:]), "one of its two matrices alone"),
        (lambda t: change(t, "lora_A.weight", "dora_scale"), "is of no LoRA"),
        (lambda _: {}, "holds no LoRA"),
    ],
)
def test_one_for_another_model_is_refused(
    damage: Damage, message: str, files: dict[str, Path], euler_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    tensors = dict(sorted(load_file(files["plain"]).items()))
    save_file({name: value.contiguous() for name, value in damage(tensors).items()}, path)
    with pytest.raises(InputError, match=message) as refusal:
        loaded_part(euler_checkpoint, [{"path": str(path)}])
    assert str(path) in str(refusal.value)


def test_files_that_are_no_safetensors_are_refused(
    files: dict[str, Path], euler_checkpoint: Path, tmp_path: Path
) -> None:
    torch.save(load_file(files["plain"]), tmp_path / "lora.bin")
    (tmp_path / "lora.safetensors").write_bytes((tmp_path / "lora.bin").read_bytes())
    for name, message in (
        ("lora.bin", "pickles and other formats are never loaded"),
        ("lora.safetensors", "corrupt or truncated"),
        ("none.safetensors", "there is no such file"),
    ):
        with pytest.raises(InputError, match=message):
            loaded_part(euler_checkpoint, [{"path": str(tmp_path / name)}])
    with pytest.raises(InputError, match="expert must be both, not low"):
        loaded_part(euler_checkpoint, [{"path": str(files["plain"]), "expert": "low"}])
    pipe = diffusers.WanPipeline.from_pretrained(euler_checkpoint)
    with pytest.raises(InputError, match=r"model.lora: the pipeline is in memory already"):
        Engine.load(pipe, overrides=all_overrides(None, None, [str(files["plain"])]))


def test_the_command_line_refuses_and_a_resume_refuses_another(
    files: dict[str, Path], tiny_model: Path, story: Path, tmp_path: Path
) -> None:
    film, path = tmp_path / "film.mp4", tmp_path / "lora.safetensors"
    tensors = {name: value for name, value in load_file(files["plain"]).items() if ".blocks.2." not in name}
    save_file(change(tensors, "transformer.", "elsewhere."), path)
    arguments = ["render", str(story), "-o", str(film), "--lora", f"{path}:0.5", "--model", str(tiny_model)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"{path}: is for another model" in done.output

    save_file(tensors, path)
    overrides = ["runtime.checkpoint_s=0", "sampler.steps=12", "queue.chunk_latents=2", "queue.context_latents=1"]
    chosen = [*overrides, *all_overrides(None, None, [f"{path}:0.5"])]

    def stop(event: Any) -> None:
        if (state_folder(film) / MANIFEST).exists():
            raise KeyboardInterrupt

    engine = Engine.load(tiny_model, overrides=chosen)
    with pytest.raises(Exception, match="interrupted"):
        engine.render(story, film, stop)
    save_file({name: value * 2 for name, value in tensors.items()}, path)
    with pytest.raises(InputError, match="the file of LoRA 1 changed"):
        Engine.load(tiny_model, overrides=chosen).render(story, film, resume=True)
    others = [*overrides, *all_overrides(None, None, [f"{path}:0.25"])]
    with pytest.raises(InputError, match=r"model.lora.0.weight: 0.5 then, 0.25 now"):
        Engine.load(tiny_model, overrides=others).render(story, film, resume=True)
