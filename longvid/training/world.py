"""The drawn world: coloured shapes that move for ever over coloured backgrounds, with captions.

A clip is drawn by signed distance on a torus, so every motion can go on for ever: what leaves
one edge comes back at the other. Everything is a function of a numpy ``Generator``.

Lengths are fractions of the image side and speeds are per frame, so that one world serves every
resolution.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

FPS = 16
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 65),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 50),
    "purple": (140, 55, 190),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
COLOURS = tuple(PALETTE)
BACKGROUNDS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "ring", "diamond")
SIZES: dict[str, float] = {"small": 0.13, "large": 0.225}
"""Name to outer radius, as a fraction of the image side."""
MOTIONS = ("left", "right", "up", "down", "still", "orbit")
ATTRIBUTES = ("colour", "background", "shape", "size", "motion")

SPEED_RANGE = (0.014, 0.024)
ORBIT_RADIUS_RANGE = (0.19, 0.24)
MORPH_FRAMES = 12
"""A scene change inside a shot is drawn as a morph of this many frames."""
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Look:
    """What one caption says: a value for each attribute, and whether the background is shaded."""

    colour: str
    background: str
    shape: str
    size: str
    motion: str
    shaded: bool = False

    def attributes(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ATTRIBUTES}


def all_looks() -> list[Look]:
    """Every plain look whose object differs in colour from its background."""
    product = itertools.product(COLOURS, BACKGROUNDS, SHAPES, SIZES, MOTIONS)
    return [Look(*values) for values in product if values[0] != values[1]]


def is_held_out(look: Look) -> bool:
    """Whether this combination of attributes never occurs in training (a fixed 5 %)."""
    key = "|".join(look.attributes().values()).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def sample_look(rng: np.random.Generator, *, held_out: bool = False) -> Look:
    """A random look from the training part of the world, or from the held-out part."""
    while True:
        colour, background = (str(name) for name in rng.choice(COLOURS, 2, replace=False))
        look = Look(
            colour=colour,
            background=background,
            shape=str(rng.choice(SHAPES)),
            size=str(rng.choice(tuple(SIZES))),
            motion=str(rng.choice(MOTIONS)),
            shaded=bool(rng.random() < 0.3),
        )
        if is_held_out(look) == held_out:
            return look


def change_look(rng: np.random.Generator, look: Look) -> Look:
    """Another look from the training part, with one to all attributes changed."""
    while True:
        other = sample_look(rng)
        keep = rng.random(len(ATTRIBUTES)) < rng.choice((0.0, 0.5, 0.8))
        kept = {n: getattr(look, n) for n, k in zip(ATTRIBUTES, keep, strict=True) if k}
        changed = replace(other, **kept)
        if changed.colour != changed.background and changed != look and not is_held_out(changed):
            return changed


# -------------------------------------------------------------------------------- captions

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
MOTION_WORDS = {
    "left": ("moving left", "going left", "drifting to the left", "sliding left"),
    "right": ("moving right", "going right", "drifting to the right", "sliding right"),
    "up": ("moving up", "going up", "rising", "drifting upwards"),
    "down": ("moving down", "going down", "falling", "drifting downwards"),
    "still": ("standing still", "not moving", "at rest", "standing still"),
    "orbit": ("orbiting", "moving in an orbit", "going round and round", "orbiting the middle"),
}
BACKGROUND_WORDS = ("over a {} background", "on a {} background", "in front of a {} background")


def caption(look: Look, rng: np.random.Generator | None = None) -> str:
    """One wording of a look; the first of each list when ``rng`` is None."""

    def pick(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else str(rng.choice(options))

    thing = f"a {pick(SIZE_WORDS[look.size])} {look.colour} {look.shape} {pick(MOTION_WORDS[look.motion])}"
    ground = ("shaded " if look.shaded else "") + look.background
    where = pick(BACKGROUND_WORDS).format(ground)
    style = 0.0 if rng is None else rng.random()
    if style < 0.4:
        text = f"{thing} {where}"
    elif style < 0.7:
        text = f"{thing}, {where}"
    elif style < 0.85:
        text = f"{where}, {thing}"
    else:
        text = f"{thing}. the background is {ground}"
    if rng is None or rng.random() < 0.8:
        text = text.replace("a orange", "an orange")
    return text if rng is None or rng.random() < 0.5 else text + "."


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that a caption can hold, sorted."""
    phrases = [*SIZE_WORDS.values(), *MOTION_WORDS.values(), BACKGROUND_WORDS, COLOURS, SHAPES]
    words = {word for group in phrases for phrase in group for word in phrase.replace("{}", "").split()}
    return tuple(sorted(words | {"a", "an", "the", "is", "shaded", "plain", ",", "."}))


# --------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Track:
    """Where the object is: a start on the unit torus and one velocity a frame."""

    start: tuple[float, float]
    velocity_T2: FloatArray

    def positions(self) -> FloatArray:
        """Unwrapped centres, float32 [num_frames, 2], (x, y), y down."""
        steps = np.cumsum(self.velocity_T2, axis=0) - self.velocity_T2
        return (np.asarray(self.start, np.float32) + steps).astype(np.float32)


@dataclass(frozen=True)
class Clip:
    """A drawn clip. ``changes`` holds the frame from which each look's caption holds."""

    frames: NDArray[np.uint8]
    looks: tuple[Look, ...]
    changes: tuple[int, ...]


def motion_velocity(rng: np.random.Generator, motion: str, num_frames: int) -> FloatArray:
    """Velocity of one motion, float32 [num_frames, 2], in image sides a frame."""
    speed = rng.uniform(*SPEED_RANGE)
    fixed = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
    if motion in fixed:
        return np.tile(np.asarray(fixed[motion], np.float32) * np.float32(speed), (num_frames, 1))
    angle = rng.uniform(0, 2 * math.pi) + speed / rng.uniform(*ORBIT_RADIUS_RANGE) * np.arange(num_frames)
    return (speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


def _start(rng: np.random.Generator, motion: str, velocity: FloatArray) -> tuple[float, float]:
    if motion != "orbit":
        x, y = rng.uniform(0.27, 0.73, 2)
        return float(x), float(y)
    # The centre of an orbit lies a quarter turn to the right of the velocity, one radius away.
    speed = float(np.hypot(*velocity[0]))
    turn = float(np.arctan2(velocity[1, 1], velocity[1, 0]) - np.arctan2(velocity[0, 1], velocity[0, 0]))
    radius = speed / (turn % (2 * math.pi))
    centre = rng.uniform(0.46, 0.54, 2)
    unit = velocity[0] / speed
    return float(centre[0] + radius * unit[1]), float(centre[1] - radius * unit[0])


def signed_distance(shape: str, dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    """Signed distance (negative inside) of a shape with an outer radius, centred at the origin."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - radius * 0.74) - radius * 0.26
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.86
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy) - radius * 1.15) * math.sqrt(0.5)
    elif shape == "triangle":
        slope = math.cos(math.pi / 6) * np.abs(dx) - 0.5 * dy
        distance = np.maximum(slope - radius * 0.5, dy - radius * 0.5)
    else:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    return distance.astype(np.float32)


def _background(look: Look, side: int) -> FloatArray:
    rgb = np.asarray(PALETTE[look.background], np.float32)
    plain = np.broadcast_to(rgb, (side, side, 3))
    if not look.shaded:
        return plain
    ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    far = rgb * 0.72 if rgb.sum() > 120 else rgb + 40
    return plain * (1 - ramp) + far.astype(np.float32) * ramp


def draw(looks: list[Look], weights_TK: FloatArray, track: Track, side: int) -> NDArray[np.uint8]:
    """Draw frames, uint8 [T, side, side, 3]; ``weights_TK`` mixes the looks in each frame."""
    num_frames = weights_TK.shape[0]
    centres = track.positions()[:, :, None, None]
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side).astype(np.float32)
    dx: FloatArray = (axis[None, None, :] - centres[:, 0] + 0.5) % 1.0 - 0.5
    dy: FloatArray = (axis[None, :, None] - centres[:, 1] + 0.5) % 1.0 - 0.5
    radius: FloatArray = weights_TK @ np.asarray([SIZES[look.size] for look in looks], np.float32)
    distance = np.zeros((num_frames, side, side), np.float32)
    for i, look in enumerate(looks):
        distance += weights_TK[:, i, None, None] * signed_distance(look.shape, dx, dy, radius[:, None, None])
    cover = np.clip(0.5 - distance * side, 0, 1)[..., None]
    colour = weights_TK @ np.asarray([PALETTE[look.colour] for look in looks], np.float32)
    if len(looks) == 1:
        ground: FloatArray = _background(looks[0], side)[None]
    else:
        ground = np.einsum("tk,kyxc->tyxc", weights_TK, np.stack([_background(k, side) for k in looks]))
    frames = ground * (1 - cover) + colour[:, None, None, :] * cover
    return np.asarray(np.rint(frames), np.uint8)


def make_clip(
    rng: np.random.Generator, num_frames: int, side: int, *, looks: list[Look] | None = None, change_share: float = 0.3
) -> Clip:
    """A random clip; a share of clips changes its look midway, at a latent's first frame.

    With ``looks`` given, the clip shows them one after the other, evenly spaced.
    """
    if looks is None:
        looks = [sample_look(rng)]
        if num_frames >= 25 and rng.random() < change_share:
            looks.append(change_look(rng, looks[0]))
            # 4 frames a latent after the first: changes fall on a latent's first frame.
            changes = [0, 1 + 4 * int(rng.integers(2, (num_frames - 1) // 4 - 2))]
        else:
            changes = [0]
    else:
        changes = [round(i * num_frames / len(looks)) for i in range(len(looks))]
    film = Travel.draw(rng, looks, changes, num_frames)
    return Clip(film.frames(0, num_frames, side), tuple(looks), tuple(changes))


@dataclass(frozen=True)
class Travel:
    """An object's way through a film of any length, and how much of each look its frames show: what is to be drawn."""

    looks: list[Look]
    weights_TK: FloatArray
    track: Track

    @classmethod
    def draw(cls, rng: np.random.Generator, looks: list[Look], changes: list[int], num_frames: int) -> Travel:
        """A way for looks that begin at these frames."""
        weights = morph_weights(changes, num_frames)
        # One frame more than is drawn: where an orbit starts depends on how its velocity turns.
        velocities = [motion_velocity(rng, look.motion, num_frames + 1) for look in looks]
        start = _start(rng, looks[0].motion, velocities[0])
        velocity = np.einsum("tk,ktd->td", weights, np.stack(velocities)[:, :-1]).astype(np.float32)
        return cls(looks, weights, Track(start, velocity))

    def frames(self, first: int, count: int, side: int) -> NDArray[np.uint8]:
        """Draw frames, uint8 [count, side, side, 3]."""
        shown = slice(first, first + count)
        x, y = self.track.positions()[first].tolist()
        return draw(self.looks, self.weights_TK[shown], Track((x, y), self.track.velocity_T2[shown]), side)


def morph_weights(changes: list[int], num_frames: int) -> FloatArray:
    """How much of each look a frame shows, float32 [num_frames, len(changes)], rows sum to 1."""
    time = np.arange(num_frames, dtype=np.float32)
    arrived = [np.clip((time - change + 1) / MORPH_FRAMES, 0, 1) for change in changes[1:]]
    levels = np.stack([np.ones_like(time), *arrived, np.zeros_like(time)])
    return np.ascontiguousarray((levels[:-1] - levels[1:]).T)


def read_caption(text: str) -> dict[str, str]:
    """The attributes that a prompt names; those it does not name are absent."""
    words = text.lower().replace(",", " ").replace(".", " ").replace(";", " ").split()
    joined = " ".join(words)
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if word in PALETTE:
            is_ground = words[i + 1 : i + 2] == ["background"] or " ".join(words[:i]).endswith("background is")
            is_ground = is_ground or words[i - 1 : i] == ["shaded"] or words[max(0, i - 2) : i] == ["is", "shaded"]
            found.setdefault("background" if is_ground else "colour", word)
        elif word in SHAPES:
            found.setdefault("shape", word)
    for attribute, table in (("size", SIZE_WORDS), ("motion", MOTION_WORDS)):
        for name, phrases in table.items():
            if any(f" {phrase} " in f" {joined} " for phrase in phrases):
                found.setdefault(attribute, name)
    return found


assert {field.name for field in fields(Look)} == {*ATTRIBUTES, "shaded"}
