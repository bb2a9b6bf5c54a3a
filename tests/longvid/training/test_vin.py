"""Training of global tokens: it learns, goes on where it ended, and DeepSpeed's shards make the same adapter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.vin import Vin
from longvid.models.vin_config import WEIGHTS_FILE
from longvid.parallel.snapshot import is_remembered
from longvid.training import world
from longvid.training.films import FilmLayout, FilmSet, draw_film, draw_films
from longvid.training.latents import LatentSet
from longvid.training.loop import LoopSettings
from longvid.training.text import make_text_encoder, make_tokenizer
from longvid.training.train_dit import World
from longvid.training.train_vin import (
    VinSettings,
    Zero,
    leader_first,
    make_optimizers,
    run_vin,
    train_batch,
    train_vin,
    train_vin_sharded,
    vin_settings,
)
from longvid.training.vin import VinTrainee, config_for, draw_moment

LAYOUT = FilmLayout(chunks=3, chunk_latents=2, context_latents=1, spacing=2, octaves=2, farthest=4)
LOOP = LoopSettings(4, 1e-2, 2, warmup=1, save_every=2, log_every=1)
SETTINGS = VinSettings(LOOP, LAYOUT, tokens=3, processors=1, compare_every=1000)


def make_trainee() -> tuple[VinTrainee, FilmSet]:
    """A tiny random transformer and films of noise, in which each film has a colour of its own."""
    torch.manual_seed(0)
    dit = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=128,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    torch.nn.init.normal_(dit.proj_out.weight, std=0.2)
    rng = np.random.default_rng(0)
    remembered = LAYOUT.memory[-1].stop

    def some(num_latents: int) -> LatentSet:
        colours = 2 * rng.standard_normal((52, 1, 4, 1, 1))
        latents = (colours + 0.3 * rng.standard_normal((52, num_latents, 4, 4, 4))).astype(np.float16)
        looks = [[world.sample_look(rng)] for _ in range(52)]
        return LatentSet(latents, looks, np.zeros((52, num_latents), np.int64))

    before = np.sort(rng.integers(0, 99, (52, remembered)), axis=1)[:, ::-1].copy()
    data = FilmSet(some(LAYOUT.num_latents), some(LAYOUT.num_latents + remembered), before)
    tokenizer = make_tokenizer()
    vin = Vin(config_for(dit, LAYOUT, SETTINGS.tokens, SETTINGS.processors))
    vin.begin_as(dit)
    known = World(data.young, data.old, tokenizer, make_text_encoder(len(tokenizer)))
    return VinTrainee(dit, vin, known, LAYOUT, 5.0), data


def test_a_few_steps_on_one_batch_reduce_its_error_and_leave_the_transformer_alone() -> None:
    trainee, data = make_trainee()
    before = {name: value.clone() for name, value in trainee.dit.state_dict().items()}
    moment = draw_moment(np.random.default_rng(1), LAYOUT, (0, 0, 1))
    batch = draw_films(data, LAYOUT, np.random.default_rng(1), 4, young=moment.young)
    optimizers = make_optimizers(trainee.vin, 1e-2)
    errors = []
    for _ in range(25):
        error, alone = trainee(batch, moment, 0.0)
        error.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        errors.append(float(error.detach()))
    assert errors[0] == pytest.approx(float(alone), rel=1e-3)  # the gates are closed at first
    assert errors[-1] < 0.9 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in trainee.dit.state_dict().items())


@given(st.integers(0, 2**31))
def test_a_moment_is_what_the_queue_or_chunks_together_show(seed: int) -> None:
    layout = FilmLayout()
    assert [len(window) for window in layout.windows] == [10] * 8
    moment = draw_moment(np.random.default_rng(seed), layout)
    assert len(moment.windows) == layout.denoised
    assert (moment.left <= moment.own).all() and (moment.own <= moment.right).all()
    assert moment.own.min() > 0 and moment.right.max() <= 1 and moment.left.min() >= 0
    own = dict(zip(moment.windows, moment.own, strict=True))
    for latent, level in zip(moment.keys, moment.key_levels, strict=True):
        if latent >= layout.num_latents:  # remembered: finished, or of the same group
            assert not moment.young and (level == 0 or set(own.values()) == {level})
            continue
        chunk = next(i for i, owned in enumerate(layout.owned(young=moment.young)) if latent in owned)
        assert latent % layout.spacing == 0 and level < 1
        # A key latent stood a step earlier, or where all stand; a finished one is clean.
        assert level == 0 or chunk not in own or own[chunk] <= level + 1e-9


@given(st.integers(0, 2**31), st.booleans())
@hypothesis_settings(deadline=None, max_examples=20)
def test_what_is_remembered_of_a_film_lies_on_its_track_and_is_what_the_queue_remembers(seed: int, young: bool) -> None:
    layout = FilmLayout(chunks=2, octaves=3, farthest=5)
    film = draw_film(np.random.default_rng(seed), layout, 16, young=young)
    assert len(film.clips[0]) == 4 * (layout.num_latents + (not young) * 2) - 3
    assert len(film.look_of_latent) == layout.num_latents + len(film.before)
    if young:
        assert not film.before
        return
    start = film.before[0]  # of the first chunk's first key, the film's first latent
    oldest = start // layout.chunk_latents
    remembered = [i for i in range(oldest) if is_remembered(i, 0, oldest, 99)]
    at = [start - before for before in film.before]
    assert at[:3] == layout.remembered_keys(0)
    for octave, group in enumerate(reversed(layout.memory[1:])):
        chunk = at[group.start] // layout.chunk_latents
        assert at[group.start : group.stop] == layout.remembered_keys(chunk)
        assert (oldest - chunk).bit_length() - 1 == octave
    assert oldest - 1 in remembered and at[-1] == layout.remembered_keys(oldest - 1)[-1]
    # A latent's frames are those of the film: the nearest keys end where what is seen begins.
    if len(film.looks) == 1 and film.looks[0].motion == "still":
        assert np.array_equal(film.clips[1][0], film.clips[0][-1])


def test_a_training_that_was_interrupted_goes_on_to_the_same_adapter(tmp_path: Path) -> None:
    weights = []
    for parts in ([4], [2, 4]):
        folder = tmp_path / str(len(parts))
        for steps in parts:
            trainee, data = make_trainee()
            # The learning rate counts to the end of the whole training.
            settings = replace(SETTINGS, loop=replace(LOOP, steps=steps, final_lr_share=1.0))
            vin = train_vin(folder, settings, trainee, data)
        weights.append(vin.state_dict())
        assert len((folder / "log.jsonl").read_text().splitlines()) == 4
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(layer.gate.abs().max() > 0 for layer in vin.layers.values())


def run_two_ranks(folder: Path) -> None:
    """This file's `main`, as two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder)],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)


def main(folder: Path) -> None:
    """Train with both kinds of ZeRO, in two goes each."""
    torch.set_num_threads(1)
    kinds: tuple[Zero, ...] = ("zero2", "zero3")
    for zero in kinds:
        place = folder / zero
        place.mkdir(exist_ok=True)
        for steps in (2, 3):
            with leader_first(zero) as is_leader:
                trainee, data = make_trainee()
            settings = replace(SETTINGS, loop=replace(LOOP, steps=steps, final_lr_share=1.0))
            vin = train_vin_sharded(place, settings, trainee, data, lambda _: None, zero)
        if is_leader:
            vin.save(place / "vin", torch.float32)


def test_two_ranks_of_deepspeed_train_what_one_process_would_and_go_on(tmp_path: Path) -> None:
    """Both kinds of ZeRO make, in two goes, the adapter that the mean of both ranks' gradients makes."""
    pytest.importorskip("deepspeed")
    run_two_ranks(tmp_path)
    trainee, data = make_trainee()
    start = torch.cat([p.detach().flatten().clone() for p in trainee.vin.parameters()])
    optimizer = torch.optim.AdamW(trainee.vin.parameters(), lr=LOOP.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(3):
        losses = [trainee(*train_batch(data, SETTINGS, step, rank), SETTINGS.pull)[0] for rank in range(2)]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainee.vin.parameters(), LOOP.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in trainee.vin.parameters()])
    for zero in ("zero2", "zero3"):
        found = torch.cat([p.detach().flatten() for p in Vin.load(tmp_path / zero / "vin").parameters()])
        # Adam's first steps are as large as the learning rate, whatever the gradient's size: some signs may differ.
        assert (found - expected).norm() < 0.1 * (expected - start).norm(), zero


def test_the_recipe_makes_an_adapter_that_its_model_runs_with(tiny_model: Path, story: Path, tmp_path: Path) -> None:
    layout = FilmLayout(chunks=2, chunk_latents=1, context_latents=1, spacing=1, octaves=1, farthest=2)
    settings = vin_settings(steps=2, batch=1, lr=1e-2, seed=0, threads=1, tokens=3, guidance=2.0, clips=150)
    settings = replace(settings, layout=layout, side=32, compile_blocks=False)
    logged: list[dict[str, float | str]] = []
    folder = run_vin(tmp_path, str(tiny_model), settings, None, logged.append)
    assert logged[0]["stage"] == "encode" and "memory gain" in logged[-1]
    other = run_vin(
        tmp_path / "other",
        str(tiny_model),
        replace(settings, loop=replace(settings.loop, lr=0.0)),
        None,
        logged.append,
        folder,
    )
    assert (other / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(InputError, match="of other sizes"):
        run_vin(tmp_path / "more", str(tiny_model), replace(settings, tokens=4), None, logged.append, folder)
    engine = Engine.load(tiny_model, overrides=["sampler.steps=3", "vin.policy=on", f"vin.path={folder}"])
    assert sum(len(frames) for frames in engine.stream(story)) == 29
    with pytest.raises(InputError, match="no launcher started ranks"):
        run_vin(tmp_path, str(tiny_model), settings, "zero2", logged.append)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
