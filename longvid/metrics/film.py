"""Measures of a film file, in one pass: what its scenes show, how steady it is, how near it is to a reference."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvid.errors import InputError
from longvid.metrics.fidelity import WINDOW as SSIM_WINDOW
from longvid.metrics.fidelity import Fidelity
from longvid.metrics.images import box_average
from longvid.metrics.loops import LoopDetector, Return
from longvid.metrics.reader import FilmReader
from longvid.metrics.scenes import SceneMeter, Span, attribute_adherence, joint_adherence, quarters, scene_spans
from longvid.metrics.temporal import Drift, Flicker, Moment, Seams
from longvid.script import Script

Image = NDArray[np.uint8]


def measure_film(
    path: str | Path,
    script: Script | None = None,
    reference: str | Path | None = None,
    chunk_borders: Collection[int] | None = None,
    scale: int = 1,
) -> dict[str, Any]:
    """Measure a film, at the size that it had before it was upscaled by `scale`.

    With a script, the film is read scene by scene and judged by the prompts; without, it counts as one section, cuts
    and all. With `chunk_borders`, the first frame of each chunk, seams are measured. With a reference, PSNR and SSIM
    tell how near the film is to it, over the frames that both have.

    Returns plain data, ready for JSON; what was not or cannot be measured is None. Raises InputError for a film that is
    missing, damaged or cut off, longer than its script, or not of its reference's size.
    """
    with ExitStack() as stack:
        film = stack.enter_context(FilmReader(path))
        spans = scene_spans(script, film.fps) if script else []
        meters = _Meters(film.fps, spans, chunk_borders or ())
        others = _reference_frames(stack, film, reference, scale) if reference else iter(())
        fidelity = Fidelity()
        num_frames = 0
        for image in film.frames():
            native = box_average(image, scale)
            meters.push(num_frames, native)
            num_frames += 1
            if (other := next(others, None)) is not None:
                fidelity.push(native, box_average(other, scale))
    if script and num_frames > spans[-1].stop:
        raise InputError(
            f"{path}: has {num_frames} frames, but {script.path} asks for {spans[-1].stop}; is it its film?"
        )
    return {
        "frames": num_frames,
        "fps": film.fps,
        "width": film.width,
        "height": film.height,
        "seconds": num_frames / film.fps,
        **meters.report(num_frames, film.fps),
        "psnr": fidelity.psnr() if reference else None,
        "ssim": fidelity.ssim() if reference else None,
        "compared_frames": fidelity.num_frames if reference else None,
    }


def _reference_frames(stack: ExitStack, film: FilmReader, path: str | Path, scale: int) -> Iterator[Image]:
    reference = stack.enter_context(FilmReader(path))
    size, wanted = (reference.width, reference.height), (film.width, film.height)
    if size != wanted:
        raise InputError(f"{path}: is {size[0]} x {size[1]}, but {film.path} is {wanted[0]} x {wanted[1]}")
    if min(size) // scale < SSIM_WINDOW:
        raise InputError(f"{film.path}: SSIM needs {SSIM_WINDOW} pixels a side, got {min(size) // scale}")
    return reference.frames()


class _Meters:
    """All meters of one film. Its sections are its scenes without the frames in which they change."""

    def __init__(self, fps: float, spans: list[Span], chunk_borders: Collection[int]) -> None:
        self._flicker, self._drift, self._loops = Flicker(), Drift(fps), LoopDetector(fps)
        self._seams = Seams(chunk_borders)
        self._spans = spans
        self._scenes: list[SceneMeter] = []

    def push(self, index: int, image: Image) -> None:
        scene = self._scene_at(index)
        if scene is not None and index < scene.span.settled:
            return
        moment = Moment(index, len(self._scenes), image)
        for meter in (self._flicker, self._drift, self._loops, self._seams):
            meter.push(moment)
        if scene is not None:
            scene.push(image)

    def report(self, num_frames: int, fps: float) -> dict[str, Any]:
        if self._scenes:
            self._scenes[-1].finish()
        judged = [window for scene in self._scenes if scene.wanted for window in scene.windows]
        returns = self._loops.value()
        loops = {section: self._loop(section, found, fps) for section, found in returns.items()}
        seams = self._seams.value()
        return {
            "scenes": [
                scene.summary() | {"loop": loops.get(section)} for section, scene in enumerate(self._scenes, start=1)
            ],
            "adherence": attribute_adherence(judged),
            "joint_adherence": joint_adherence(judged),
            "joint_adherence_quarters": quarters(judged, num_frames),
            "seam_ratio": seams["ratio"] if seams else None,
            "seam_second_ratio": seams["second_ratio"] if seams else None,
            "flicker": self._flicker.value(),
            "drift": self._drift.value(),
            "loop": max(loops.values(), key=lambda loop: (loop["found"], loop["relative"]), default=None),
        }

    def _scene_at(self, index: int) -> SceneMeter | None:
        """The scene of the next frame; begins it, and ends the one before, on its first frame."""
        begun = len(self._scenes)
        if begun < len(self._spans) and index == self._spans[begun].first:
            if self._scenes:
                self._scenes[-1].finish()
            self._scenes.append(SceneMeter(self._spans[begun]))
        return self._scenes[-1] if self._scenes else None

    def _loop(self, section: int, found: Return, fps: float) -> dict[str, Any]:
        period = self._scenes[section - 1].period_frames() if section else None
        return {
            "found": found.is_loop(period),
            "scene": section - 1 if section else None,
            "lag_frames": found.lag_frames,
            "lag_s": found.lag_frames / fps,
            "similarity": found.similarity,
            "relative": found.relative,
            "motion_period_frames": period,
        }
