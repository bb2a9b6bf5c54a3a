"""The grid of a video VAE: how frames become latents, and pixels become tokens; and when its decoder decodes.

All of it holds within one shot. A shot's first latent holds one frame and every later one holds `temporal` frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from longvid.errors import InputError


@dataclass(frozen=True)
class LatentGrid:
    """Compression of the VAE (frames and pixels a latent cell) and the transformer's patch (latents, rows, columns)."""

    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int, int] = (1, 2, 2)
    odd: bool = False
    """Whether a shot must have an odd number of latents."""

    def __post_init__(self) -> None:
        assert self.temporal >= 1 and self.spatial >= 1 and min(self.patch) >= 1
        assert self.patch[0] == 1, "a token belongs to one latent, for each latent has its own prompt and timestep"

    def num_latents(self, num_frames: int) -> int:
        """Latents that hold `num_frames` frames: 1 + ceil((n - 1) / temporal), and 0 for none."""
        assert num_frames >= 0
        return 1 + -(-(num_frames - 1) // self.temporal) if num_frames else 0

    def whole_shot(self, num_latents: int) -> int:
        """Latents of a shot that needs so many: one more where they must be odd."""
        return num_latents + (self.odd and num_latents % 2 == 0)

    def num_frames(self, num_latents: int) -> int:
        """Frames that `num_latents` latents decode to: 1 + (n - 1) * temporal, and 0 for none."""
        assert num_latents >= 0
        return 1 + (num_latents - 1) * self.temporal if num_latents else 0

    def latent_of(self, frame: int) -> int:
        """The latent that holds a frame."""
        return self.num_latents(frame + 1) - 1

    def frames_of(self, latent: int) -> range:
        """The frames that a latent holds."""
        return range(self.num_frames(latent), self.num_frames(latent + 1))

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in latent cells. Raises InputError for a size in pixels that is off the grid."""
        _, rows, columns = self.patch
        for name, pixels, patch in (("width", width, columns), ("height", height, rows)):
            unit = self.spatial * patch
            if pixels < unit or pixels % unit:
                below = pixels // unit * unit
                nearest = f"{below} and {below + unit} are" if below > 0 else f"{unit} is"
                grid = f"the {name} must be a multiple of {unit} for this model"
                raise InputError(f"size {width} x {height}: {grid}; {nearest} nearest")
        return width // self.spatial, height // self.spatial

    def tokens_per_latent(self, width: int, height: int) -> int:
        """Tokens that the transformer sees for one latent of a film of this size in pixels."""
        _, rows, columns = self.patch
        latent_width, latent_height = self.latent_size(width, height)
        return (latent_width // columns) * (latent_height // rows)


@dataclass(frozen=True)
class DecoderPasses:
    """When a streaming decoder decodes what of a shot: latents wait until those of a pass are there.

    The first pass is due with latent number `first`, another with every `step` latents after it. A pass is of the
    newest `window` latents, the first one of all `first`. The shot's end has what is left decoded.
    """

    first: int = 1
    step: int = 1
    window: int = 1

    @property
    def repeated(self) -> float:
        """How often a latent goes through the decoder, in the long run."""
        return self.window / self.step

    def work(self, latent: int, shot_latents: int) -> int:
        """Latents that go through the decoder when a latent comes, of a shot of so many."""
        come = latent + 1
        is_due = come >= self.first and (come - self.first) % self.step == 0
        work = (self.window if come > self.first else self.first) if is_due else 0
        return work + self._left(come) if come == shot_latents else work

    def works(self, latents: range, shot_latents: int) -> tuple[int, ...]:
        """Those of each of some of a shot's latents."""
        return tuple(self.work(latent, shot_latents) for latent in latents)

    def _left(self, come: int) -> int:
        """What a shot's end has decoded. A last latent alone is in the tile before."""
        if come < self.first:
            return come
        begun, work = (1 + (come - self.first) // self.step) * self.step + self.first - self.window, 0
        while come - begun > (self.window > self.step):
            work += min(self.window, come - begun)
            begun += self.step
        return work


EACH_ALONE = DecoderPasses()
"""Every latent is decoded when it comes."""
