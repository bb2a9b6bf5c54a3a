"""``longvid train vin``: the loop around `training.vin`, on one process or, with DeepSpeed's ZeRO, on many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longvid.errors import InputError
from longvid.launch.env import rank_of
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.models.vin import Vin
from longvid.models.vin_config import VinConfig
from longvid.models.wan_checkpoint import WanCheckpoint
from longvid.training.dit import block_forward
from longvid.training.films import FilmBatch, FilmLayout, FilmSet, draw_films, encode_films, load_films
from longvid.training.loop import Ema, LoopSettings, OnLog, Run, finite_or_stop, lr_share
from longvid.training.muon import Muon, split_parameters
from longvid.training.train_dit import World
from longvid.training.vae import compile_norms
from longvid.training.vin import KINDS, Moment, VinTrainee, config_for, draw_moment

Zero = Literal["zero2", "zero3"]
"""What DeepSpeed splits over ranks: optimiser states and gradients; or the weights, too."""

HELD_OUT = 48
"""Films of each kind that are never trained on: the first ones."""


@dataclass(frozen=True)
class VinSettings:
    """Sizes of a training. ``loop.batch`` counts films; ``pull`` is 1 - 1 / the guidance that the model learned."""

    loop: LoopSettings
    layout: FilmLayout = field(default_factory=FilmLayout)
    tokens: int = 32
    processors: int = 2
    pull: float = 0.5
    compare_every: int = 200
    clips: int = 1024
    side: int | None = None
    """Of the drawn films, in pixels; None: the shorter of the model's own."""
    compile_blocks: bool = True


def make_optimizers(vin: Vin, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest; gates open faster than the rest learns."""
    matrices, others = split_parameters(vin, lambda name, p: p.ndim == 2 and not name.endswith(".start"))
    gates = [vin.layer(int(index)).gate for index in vin.layers]
    rest = [p for p in others if all(p is not gate for gate in gates)]
    groups = [{"params": rest, "lr": lr}, {"params": gates, "lr": 5 * lr}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=lr, weight_decay=0.01), adamw]


def train_batch(data: FilmSet, settings: VinSettings, step: int, rank: int = 0) -> tuple[FilmBatch, Moment]:
    """What a rank trains on at a step."""
    rng = np.random.default_rng((settings.loop.seed, 6, step, rank))
    moment = draw_moment(rng, settings.layout)
    films = data.part(slice(HELD_OUT, None))
    return draw_films(films, settings.layout, rng, settings.loop.batch, young=moment.young), moment


@torch.no_grad()
def compare(trainee: VinTrainee, data: FilmSet, settings: VinSettings, rounds: int = 4) -> dict[str, float | str]:
    """How much less error there is with tokens than without, a kind of moment, on films that were held out."""
    held_out, gains = data.part(slice(HELD_OUT)), {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((settings.loop.seed, 7, number))
        errors = np.zeros(2)
        for _ in range(rounds):
            moment = draw_moment(rng, settings.layout, np.eye(len(KINDS))[number].tolist())
            batch = draw_films(held_out, settings.layout, rng, settings.loop.batch, young=moment.young)
            errors += [float(error) for error in trainee(batch, moment, settings.pull)]
        gains[f"{kind} gain"] = float(1 - errors[0] / errors[1])
    return dict(gains)


def train_vin(
    folder: Path, settings: VinSettings, trainee: VinTrainee, data: FilmSet, on_log: OnLog = lambda _: None
) -> Vin:
    """Train, or go on training, in ``folder``; returns the adapter with averaged weights."""
    loop, vin = settings.loop, trainee.vin
    optimizers = make_optimizers(vin, loop.lr)
    ema = Ema(vin, loop.ema_decay)
    run = Run(folder, loop, {"kind": "vin"})
    parts: dict[str, Any] = {"vin": vin, "ema": ema, "muon": optimizers[0], "adamw": optimizers[1]}
    run.load(parts)
    losses: list[tuple[float, float]] = []
    for step in run.steps(parts, optimizers):
        loss, alone = trainee(*train_batch(data, settings, step), settings.pull)
        _update(loss, vin, optimizers, loop.grad_clip)
        ema.update(vin, step)
        losses.append((finite_or_stop(loss, step), float(alone)))
        if step % loop.log_every == 0:
            mean, mean_alone = np.mean(losses, axis=0)
            values: dict[str, float | str] = {"loss": float(mean), "gain": float(1 - mean / mean_alone)}
            if step % settings.compare_every == 0:
                values |= compare(trainee, data, settings)
            run.log(**values)
            on_log({"step": step, **values})
            losses = []
    ema.copy_to(vin)
    return vin


def _update(loss: Tensor, vin: Vin, optimizers: list[torch.optim.Optimizer], clip: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vin.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------- the recipe


def run_vin(
    folder: Path, model: str, settings: VinSettings, zero: Zero | None, on_log: OnLog, start: Path | None = None
) -> Path:
    """Train an adapter for a model in ``folder``, on films of the drawn world; returns the adapter's directory.

    With a ``start`` it begins as the adapter in that directory. With ``zero`` this is one of the ranks that a launcher
    started. Raises InputError for a model that it is not for.
    """
    checkpoint = open_checkpoint(model)
    facts, device = checkpoint.facts, torch.device("cpu")
    if not isinstance(checkpoint, WanCheckpoint) or facts.image == "required" or facts.boundary_ratio is not None:
        raise InputError(f"train vin: {facts.name}: adapters are of Wan's text-to-video models of one expert")
    if zero and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    with leader_first(zero) as is_leader:
        data = _films(folder / "films", checkpoint, settings, on_log if is_leader else lambda _: None)
    tokenizer, encoder = checkpoint.load_text(torch.float32, device)
    dit = checkpoint.load_layers(ModelPart(range(facts.num_layers)), torch.float32, device)
    torch.manual_seed(settings.loop.seed)
    vin = Vin(config_for(dit, settings.layout, settings.tokens, settings.processors)).to(device)
    if start is None:
        vin.begin_as(dit)
    else:
        vin = _load_start(start, vin.config).to(device)
    run_block: Any = block_forward
    if settings.compile_blocks and not zero:
        torch._dynamo.config.recompile_limit = 64
        run_block = torch.compile(block_forward, dynamic=False)
    shift = float(checkpoint.scheduler.config.get("shift", 1.0))
    trainee = VinTrainee(dit, vin, World(data.young, data.old, tokenizer, encoder), settings.layout, shift, run_block)
    train = train_vin if zero is None else _train_with(zero)
    trained = train(folder, settings, trainee, data, on_log)
    if is_leader:
        trained.save(folder / "vin")
    return folder / "vin"


def _load_start(folder: Path, wanted: VinConfig) -> Vin:
    """An adapter to begin with. Raises InputError for one of other sizes."""
    vin = Vin.load(folder)
    if vin.config != wanted:
        raise InputError(f"{folder}: is an adapter of other sizes: {vin.config}, and the training is of {wanted}")
    return vin.train()


def vin_settings(
    *, steps: int, batch: int, lr: float, seed: int, threads: int, tokens: int, guidance: float, clips: int
) -> VinSettings:
    """The recipe with the figures that a user may change."""
    loop = LoopSettings(
        steps, lr, batch, seed, warmup=50, ema_decay=0.995, save_every=50, threads=threads, decay="cosine"
    )
    return VinSettings(loop, tokens=tokens, pull=1 - 1 / guidance, clips=clips)


def _films(folder: Path, checkpoint: WanCheckpoint, settings: VinSettings, on_log: OnLog) -> FilmSet:
    """Encoded films of the drawn world, made where they are not there yet."""
    if settings.clips <= 3 * HELD_OUT:
        raise InputError(f"train vin: {settings.clips} clips are too few: {2 * HELD_OUT} are held out")
    vae: Any = checkpoint.load_vae(torch.float32, torch.device("cpu"))
    if settings.compile_blocks:
        compile_norms(vae)
    encode_films(
        vae,
        folder,
        settings.layout,
        count=settings.clips,
        side=settings.side or min(checkpoint.facts.width, checkpoint.facts.height),
        seed=settings.loop.seed,
        on_shard=lambda done: on_log({"step": done, "stage": "encode"}),
    )
    return load_films(folder)


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed_config(zero: Zero, settings: VinSettings, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's config: ZeRO alone; precision is autocast's, the learning rate ours."""
    return {
        "train_batch_size": settings.loop.batch * num_ranks,
        "train_micro_batch_size_per_gpu": settings.loop.batch,
        "gradient_clipping": settings.loop.grad_clip,
        "zero_optimization": {"stage": int(zero[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


@contextmanager
def leader_first(zero: Zero | None) -> Iterator[bool]:
    """Whether this rank is the first; the others begin when it is through. Raises InputError without a launcher."""
    if zero is None:
        yield True
        return
    deepspeed, environment = _deepspeed(), rank_of(os.environ)
    if environment is None:
        raise InputError(f"--deepspeed {zero}: no launcher started ranks: use torchrun ... -m longvid train vin ...")
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    if environment.rank:
        deepspeed.comm.barrier()
    yield environment.rank == 0
    if environment.rank == 0:
        deepspeed.comm.barrier()


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"--deepspeed cannot be used ({error}): pip install longvid[deepspeed]") from error
    return deepspeed


def _train_with(zero: Zero) -> Callable[[Path, VinSettings, VinTrainee, FilmSet, OnLog], Vin]:
    def train(folder: Path, settings: VinSettings, trainee: VinTrainee, data: FilmSet, on_log: OnLog) -> Vin:
        return train_vin_sharded(folder, settings, trainee, data, on_log, zero)

    return train


def train_vin_sharded(
    folder: Path, settings: VinSettings, trainee: VinTrainee, data: FilmSet, on_log: OnLog, zero: Zero
) -> Vin:
    """`train_vin` on all ranks together, each with films of its own. AdamW alone: Muon needs whole matrices.

    Returns the adapter, whole on every rank.
    """
    deepspeed, loop, vin = _deepspeed(), settings.loop, trainee.vin
    count, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    optimizer = torch.optim.AdamW(vin.parameters(), lr=loop.lr, betas=(0.9, 0.98), weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=trainee,
        optimizer=optimizer,
        model_parameters=list(vin.parameters()),
        config=deepspeed_config(zero, settings, count),
        dist_init_required=False,
    )
    if zero == "zero3":
        _register_own_parameters(trainee)
    state = folder / "deepspeed"
    step = 0
    if (state / "latest").exists():
        _, client = engine.load_checkpoint(str(state))
        step = client["step"]
    losses: list[tuple[float, float]] = []
    while step < loop.steps:
        for group in engine.optimizer.param_groups:
            group["lr"] = loop.lr * lr_share(step, loop)
        loss, alone = engine(*train_batch(data, settings, step, rank), settings.pull)
        engine.backward(loss)
        engine.step()
        losses.append((finite_or_stop(loss, step), float(alone)))
        if step % loop.log_every == 0 and rank == 0:
            mean, mean_alone = np.mean(losses, axis=0)
            values: dict[str, float | str] = {"loss": float(mean), "gain": float(1 - mean / mean_alone)}
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            on_log({"step": step, **values})
            losses = []
        step += 1
        if step % loop.save_every == 0 or step == loop.steps:
            engine.save_checkpoint(str(state), tag=str(step), client_state={"step": step})
    with deepspeed.zero.GatheredParameters(list(vin.parameters()), enabled=zero == "zero3"):
        whole = Vin(vin.config)
        whole.load_state_dict({name: value.detach().float().cpu().clone() for name, value in vin.state_dict().items()})
    return whole


def _register_own_parameters(trainee: VinTrainee) -> None:
    """Parameters that are read outside of their modules' own forward: ZeRO-3 gathers them for the whole step."""
    from deepspeed.runtime.zero import register_external_parameter

    for module in trainee.modules():
        if next(module.children(), None) is not None:
            for parameter in module.parameters(recurse=False):
                register_external_parameter(trainee, parameter)
