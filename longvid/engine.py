"""The engine: puts script, plan, schedule, model, decoder and writer together. The composition root."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvid.errors import InputError, Interrupted
from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started
from longvid.models.loader import Checkpoint, checkpoint_of, load_checkpoint
from longvid.models.prompts import encode_prompts, unknown_words
from longvid.models.solvers import make_sampler
from longvid.models.wan import WanStage
from longvid.models.wan_vae import WanStreamDecoder
from longvid.noise import chunk_noise
from longvid.parallel.executor import Executor, Finished
from longvid.parallel.schedule import Step, make_schedule
from longvid.plan import Chunk, ModelFacts, Plan, make_plan
from longvid.script import Script, load_script
from longvid.settings import Settings, load_settings
from longvid.writer import FilmWriter

Frames = NDArray[np.uint8]
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """The default callback."""


class Engine:
    """A loaded model that renders storyboards, one after the other."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.settings = settings
        self.device = pick_device(settings)
        self._checkpoint = checkpoint
        self._stage = WanStage(checkpoint.transformer, settings.sampler.guidance)
        self._decoder = WanStreamDecoder(checkpoint.vae)
        self._sampler = make_sampler(checkpoint.scheduler, settings.sampler)

    @classmethod
    def load(
        cls,
        model: Any = None,
        *,
        preset: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Engine:
        """Load a model once, for any number of films.

        ``model`` is a known name (``mini``), a directory in diffusers' format, or a loaded
        ``WanPipeline``, whose transformer the engine then takes over; None: what the settings say.
        ``preset`` and ``overrides`` (such as ``sampler.steps=4``) are those of the command line.
        Raises InputError for an unknown or damaged model and for wrong settings.
        """
        if isinstance(model, str | Path):
            overrides = [*overrides, f"model.path={model}"]
        settings = load_settings(preset, overrides)
        if settings.runtime.threads:
            torch.set_num_threads(settings.runtime.threads)
        if model is not None and not isinstance(model, str | Path):
            return cls(checkpoint_of(model), settings)
        dtype = getattr(torch, settings.runtime.dtype)
        checkpoint = load_checkpoint(settings.model.path, dtype=dtype, device=pick_device(settings))
        return cls(checkpoint, settings)

    @property
    def facts(self) -> ModelFacts:
        """What planning needs to know of the model: sizes, native frame rate, limits."""
        return self._checkpoint.facts

    def plan(self, story: str | Path | Script) -> Plan:
        """The plan of a storyboard (a path, or a loaded Script): shots, chunks, prompts, noise keys."""
        script = story if isinstance(story, Script) else load_script(story)
        return make_plan(script, self.settings, self.facts)

    def stream(self, story: str | Path | Script, on_event: OnEvent = ignore_event) -> Iterator[Frames]:
        """Render, and yield the film's frames as chunks finish: uint8 [T, height, width, 3], in order.

        Raises InputError for a wrong storyboard before any work, RuntimeFailure for latents that are
        not finite. Close the iterator to stop early.
        """
        return self._stream(self.plan(story), on_event)

    def render(self, story: str | Path | Script, path: str | Path, on_event: OnEvent = ignore_event) -> Path:
        """Render a storyboard to an H.264 film at ``path`` (.mp4) and return the path.

        While it runs, ``PATH.longvid/film.m3u8`` plays what is finished. Raises Interrupted on
        Ctrl-C, after saving what is finished as a film of its own.
        """
        started = time.monotonic()
        plan = self.plan(story)
        output = self.settings.output
        with FilmWriter(path, width=plan.width, height=plan.height, fps=plan.fps, output=output) as writer:
            try:
                for frames in self._stream(plan, on_event):
                    writer.append(frames)
                film = writer.finish()
            except KeyboardInterrupt:
                raise Interrupted(_what_is_left(writer, path)) from None
        on_event(FilmDone(film, plan.num_frames, time.monotonic() - started))
        return film

    def denoise(self, plan: Plan, on_event: OnEvent = ignore_event) -> Iterator[Finished]:
        """Run the plan's schedule; yields each chunk's finished latents fp32 [C, F, h, w] in film order."""
        states = encode_prompts(
            self._checkpoint.tokenizer, self._checkpoint.text_encoder, [*plan.prompts, *plan.negatives]
        )
        self._stage.set_prompts(states[: len(plan.prompts)], states[len(plan.prompts) :])
        executor = Executor(self._stage, self._sampler, self._noise(plan), self.facts)
        rounds = _RoundCounter(plan, self._sampler.num_steps, self.settings, on_event)
        yield from executor.run(make_schedule(plan, self.settings), plan, rounds.on_unit)

    def _stream(self, plan: Plan, on_event: OnEvent) -> Iterator[Frames]:
        for text in self._notices(plan):
            on_event(Notice(text))
        num_rounds = _num_rounds(plan, self._sampler.num_steps, self.settings)
        on_event(Started(plan.num_frames, len(plan.chunks), num_rounds, plan.width, plan.height, plan.fps))
        for finished in self.denoise(plan, on_event):
            frames = self.decode(plan, finished)
            shot = plan.shots[finished.chunk.shot]
            done = shot.first_frame + min(self._frames_until(finished.chunk), shot.num_frames)
            yield frames
            on_event(ChunkDone(finished.chunk.index + 1, len(plan.chunks), done))

    def decode(self, plan: Plan, finished: Finished) -> Frames:
        """Frames of a chunk, uint8 [T, H, W, 3]; chunks must come in film order.

        Every shot starts a decode of its own; its last chunk is trimmed to the frames asked for.
        """
        chunk, shot = finished.chunk, plan.shots[finished.chunk.shot]
        if chunk.start == 0:
            self._decoder.reset()
        frames: Frames = self._decoder.push(finished.latents).numpy()
        surplus = self._frames_until(chunk) - shot.num_frames
        return frames[: len(frames) - surplus] if surplus > 0 else frames

    def _frames_until(self, chunk: Chunk) -> int:
        return self.facts.grid.num_frames(chunk.start + chunk.num_latents)

    def _noise(self, plan: Plan) -> Callable[[Chunk], Tensor]:
        width, height = self.facts.grid.latent_size(plan.width, plan.height)
        channels = self.facts.latent_channels
        return lambda chunk: chunk_noise(chunk, channels, height, width).to(self.device)

    def _notices(self, plan: Plan) -> Iterator[str]:
        vocabulary = self.facts.vocabulary
        if vocabulary is None:
            return
        for scene in plan.scenes:
            unknown = unknown_words(plan.prompts[scene.prompt], vocabulary)
            if unknown:
                hints = (f"{word!r}" + (f" (nearest: {near!r})" if near else "") for word, near in unknown.items())
                yield f"line {scene.line}: the model does not know {', '.join(hints)}"
        if (plan.width, plan.height) != (self.facts.width, self.facts.height):
            native = f"{self.facts.width}x{self.facts.height}"
            yield f"the model was trained at {native}; {plan.width}x{plan.height} may look wrong"


def pick_device(settings: Settings) -> torch.device:
    """The device of the settings. Raises InputError when it is not there."""
    wanted = settings.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda was asked for, but torch finds no CUDA device")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _num_rounds(plan: Plan, steps: int, settings: Settings) -> int:
    if settings.schedule == "sequential":
        return len(plan.chunks) * steps
    return len(plan.chunks) + steps - 1


class _RoundCounter:
    """Turns units into one event a round."""

    def __init__(self, plan: Plan, steps: int, settings: Settings, on_event: OnEvent) -> None:
        self._num_rounds = _num_rounds(plan, steps, settings)
        self._num_units = len(plan.chunks) * steps
        self._on_event = on_event
        self._round, self._in_round, self._done = 0, 0, 0

    def on_unit(self, unit: Step) -> None:
        if unit.round != self._round:
            self._end_round()
            self._round = unit.round
        self._in_round += 1
        self._done += 1
        if self._done == self._num_units:
            self._end_round()

    def _end_round(self) -> None:
        self._on_event(RoundDone(self._round + 1, self._num_rounds, self._in_round, self._done, self._num_units))
        self._in_round = 0


def _what_is_left(writer: FilmWriter, path: str | Path) -> str:
    partial = writer.partial()
    if partial is None:
        return f"interrupted before the first chunk was finished; {path} was not written"
    return f"interrupted; what was finished is in {partial}"
