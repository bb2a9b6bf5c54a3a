"""What a stage is given: the values of an Action, gathered from the state of the run as one `Unit` or as `KeyLatents`.

Nothing is computed here. The executor hands it to the stage, and puts away what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.cache.runtime import CacheRuntime
from longvid.parallel.actions import Encode, Forward, KvVersion, LatentVersion
from longvid.parallel.mesh import Mesh
from longvid.parallel.run_state import Live
from longvid.parallel.snapshot import key_latents
from longvid.parallel.stage import KeyLatents, Stage, Unit, global_stage
from longvid.plan import Chunk, ModelFacts
from longvid.sampler import Sampler


@dataclass(frozen=True)
class StageInputs:
    """Makes the inputs of one rank's stage; the fields are the executor's."""

    stage: Stage
    sampler: Sampler
    facts: ModelFacts
    latent_size: tuple[int, int]
    mesh: Mesh
    cache: CacheRuntime | None
    sharing: range

    def unit(self, action: Forward, chunks: Sequence[Chunk], live: Live) -> Unit:
        """Own latents, behind the last latents of the left context if that is recomputed, each at its own level."""
        i, k, chunk = action.chunk, action.step, chunks[action.chunk]
        levels, before = [k] * chunk.num_latents, 0
        if isinstance(action.left, LatentVersion):
            before = chunk.num_left
            levels = [action.left.version if self.facts.per_token_timesteps else k] * before + levels
        own = LatentVersion(i, k)
        latents = (live.borders if own in live.borders else live.latents)[own] if self.mesh.is_first else None
        if latents is not None and isinstance(action.left, LatentVersion):
            left = live.borders[action.left] if action.left in live.borders else live.latents[action.left]
            latents = torch.cat([left[:, -before:], latents], dim=1)
        times = [self.sampler.timestep(level) for level in levels]

        def span(kv: KvVersion) -> slice:
            if kv.edge == "first":
                return slice(before, before + chunks[i - 1].num_right)
            if kv.edge == "scene" and chunk.scene_end:
                return slice(before + chunk.scene_end.first, before + chunk.scene_end.stop)
            return slice(len(levels) - chunks[i + 1].num_left, len(levels))

        return Unit(
            chunk=chunk,
            step=k,
            timesteps=torch.tensor(times, dtype=torch.float32),
            latent_size=self.latent_size,
            latents=latents,
            hidden=None if self.mesh.is_first else live.hidden.pop((i, k)),
            left=live.kv[action.left] if isinstance(action.left, KvVersion) else None,
            right=live.kv[action.right] if action.right else None,
            store=tuple(span(kv) for kv in action.store),
            is_left_out=(i, k) in live.left_out,
            kept=tuple(live.kept[i, kv.edge] for kv in action.store if (i, kv.edge) in live.kept),
            num_branches=self.num_branches(k),
            num_overlap=before if action.overlap else 0,
            tokens=self.tokens(action, live),
            shared=live.kv[action.shared] if action.shared else None,
            stores_scene=any(kv.edge == "scene" for kv in action.store),
            sharing=self.sharing,
        )

    def key_latents(
        self, action: Encode, versions: Sequence[LatentVersion], chunks: Sequence[Chunk], live: Live
    ) -> KeyLatents:
        """The key latents of some chunks; how far back they are, and the prompts of all in flight, are the shot's."""
        stage, values, times, at = global_stage(self.stage), [], [], []
        for version in versions:
            chunk = chunks[version.chunk]
            found = key_latents(chunk, stage.key_spacing)
            values.append(live.latents[version][:, found])
            times += [self.sampler.timestep(version.version)] * len(found)
            at += [chunk.start + latent for latent in found]
        newest = action.latents[-1]
        told = [chunks[z.chunk] for z in action.latents if z == newest or z.version < self.sampler.num_steps]
        blends = [blend for chunk in told for blend in chunk.prompts[-chunk.num_latents :]]
        of_all = (chunks[z.chunk] for z in action.latents)
        last = max((c.start + latent for c in of_all for latent in key_latents(c, stage.key_spacing)), default=0)
        places = [last - place for place in at]
        return KeyLatents(
            torch.cat(values, dim=1) if values else torch.empty(0),
            torch.tensor(times, dtype=torch.float32),
            torch.tensor(places, dtype=torch.float32),
            tuple(dict.fromkeys(prompt for blend in blends for prompt in (blend.a, blend.b))),
        )

    def tokens(self, action: Forward, live: Live) -> Tensor | None:
        """What global tokens a unit's layers read: those of its round, as the first stage made them."""
        if action.tokens is None:
            return None
        if self.mesh.is_first:
            return live.tokens[action.tokens][: self.num_branches(action.step)]
        return live.brought.get((action.chunk, action.step))

    def num_branches(self, step: int) -> int:
        return 1 if self.skips_negative(step) else self.stage.num_branches

    def skips_negative(self, step: int) -> bool:
        is_alone = self.mesh.topology.guidance == 1 and self.stage.num_branches == 1
        return self.cache is not None and self.cache.at(step).skips_negative and not is_alone
