"""The plan: which latents each chunk owns and sees, which prompts they follow, and which noise they start from.

Pure arithmetic over the script, linear in the length of the film. A shot is a run of scenes without a cut between them,
and nothing crosses a cut: frames and latents count within a shot, unless a comment says "in the film".
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Literal

from longvid.cache.settings import plan_cache
from longvid.errors import InputError
from longvid.geometry import EACH_ALONE, DecoderPasses, LatentGrid
from longvid.script import MAX_HOURS, Scene, Script, transition_frames
from longvid.settings import QueueSettings, Settings
from longvid.sparsity.settings import Dense

INDEPENDENT_NOISE = 1_000_000_007
"""Noise keys above this are those of single chunks; those below are shots."""


@dataclass(frozen=True)
class ModelFacts:
    """What a plan must know of a model. Its positions end at `max_latents`; fps and size (pixels) are its defaults."""

    name: str
    family: str
    grid: LatentGrid
    latent_channels: int
    num_layers: int
    fps: float
    width: int
    height: int
    per_token_timesteps: bool
    max_latents: int
    vocabulary: frozenset[str] | None = None
    num_heads: int = 1
    hidden_size: int = 0
    """Width of a token's activations."""
    boundary_ratio: float | None = None
    """For a model with two experts: the share of the noise levels below which the second runs."""
    image: Literal["none", "optional", "required"] = "none"
    """Whether a shot begins with an image."""
    joint_text: bool = False
    """Whether text goes through the layers with the video's tokens: then no single modules of them can be left out."""
    relative_positions: bool = True
    """Whether K/V can be read at another position than they were made at; else a chunk sees left context alone."""
    dual_layers: int = 0
    """The first so many layers have weights of their own for text, and cost more than the others."""
    embedded_guidance: bool = False
    """Whether the model is distilled to guide itself in one pass, by a scale that it is told."""
    max_size: tuple[int, int] | None = None
    """Width and height that positions end at."""
    decoder_parts: int = 1
    """Into how many parts the layers of its decoder can be dealt out."""
    goes_on: bool = True
    """Whether a finished shot can go on: its VAE decodes nothing by what follows."""
    decoder_passes: DecoderPasses = EACH_ALONE
    """When its decoder decodes what."""


@dataclass(frozen=True, slots=True)
class PromptBlend:
    """What a latent's cross-attention returns: (1 - weight) CA(a) + weight CA(b). Ids index `Plan.prompts`."""

    a: int
    b: int
    weight: float = 0.0


def sharing_steps(num_steps: int) -> range:
    """The steps in which a `share` shares: DiTCtrl's 2 to 24 of 50. Fewer than 3 steps have none."""
    return range(math.ceil(num_steps / 25), math.ceil(num_steps / 2))


def sharing_layers(num_layers: int) -> range:
    """The layers in which a `share` shares: the last sixth, as in DiTCtrl."""
    return range(num_layers * 5 // 6, num_layers)


@dataclass(frozen=True, slots=True)
class SceneEnd:
    """Own latents [first, stop) of a chunk, with which a scene ends; chunks up to `last_reader` read their K/V."""

    first: int
    stop: int
    last_reader: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span of latents that is denoised as one unit.

    `index` is its place in the film and its order of admission; `start` is its first own latent. `prompts` covers the
    left context, then its own latents. Own latent f starts from draw `noise[f]` of the base that `noise_key` names.
    With `share` it reads the K/V of the `scene_end` of the chunk that `shares` names.
    """

    index: int
    shot: int
    start: int
    num_latents: int
    num_left: int
    num_right: int
    prompts: tuple[PromptBlend, ...]
    noise: tuple[int, ...]
    noise_key: tuple[int, int]
    shares: int | None = None
    scene_end: SceneEnd | None = None


@dataclass(frozen=True)
class Shot:
    """A run of scenes with its own timeline of latents; trimmed to `num_frames` after decoding."""

    index: int
    first_chunk: int
    num_chunks: int
    num_latents: int
    num_frames: int
    first_frame: int  # in the film
    image: Path | None = None


@dataclass(frozen=True)
class SceneSpan:
    """Where a scene lies in the film, and its prompt's id. `line` is that of the storyboard."""

    prompt: int
    first_frame: int  # in the film
    num_frames: int
    shot: int
    line: int


@dataclass(frozen=True, slots=True)
class FilmSpan:
    """One film of a plan, where several share a pipe: its chunks and shots, and the first round of its own."""

    chunks: range
    shots: range
    first_round: int = 0


@dataclass(frozen=True)
class Plan:
    """A film as data. `negatives[i]` goes with `prompts[i]`; the pairs are unique.

    Of a film that goes on, the chunks before `first_chunk` are finished.

    Or several films that are made together (`films.join`): then it has chunks, shots and scenes of one after the
    other, times and frames count within each film, and `num_frames` is that of all.
    """

    shots: tuple[Shot, ...]
    chunks: tuple[Chunk, ...]
    scenes: tuple[SceneSpan, ...]
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    fps: float
    width: int
    height: int
    num_frames: int
    seed: int
    first_chunk: int = 0
    joined: tuple[FilmSpan, ...] = ()

    @property
    def films(self) -> tuple[FilmSpan, ...]:
        """The films in it: one, unless several were joined."""
        return self.joined or (FilmSpan(range(len(self.chunks)), range(len(self.shots))),)

    def works(self, chunk: Chunk, passes: DecoderPasses) -> tuple[int, ...]:
        """What each of a chunk's latents makes a decoder of such passes do, in latents that go through it."""
        latents = range(chunk.start, chunk.start + chunk.num_latents)
        return passes.works(latents, self.shots[chunk.shot].num_latents)

    def film_of(self, chunk: Chunk) -> int:
        """Which of its films a chunk belongs to."""
        return bisect_right(self.films, chunk.index, key=lambda film: film.chunks.start) - 1


def make_plan(script: Script, settings: Settings, facts: ModelFacts, ends: Sequence[int] = ()) -> Plan:
    """Lay a script out for a model. Raises InputError where the script or the settings ask for what cannot be.

    `ends` are the frames at which the film ended before scenes were added. No chunk reaches over one, and none before
    it sees what follows; that after it sees what was finished.
    """
    fps = script.fps or facts.fps
    width, height = script.size or (facts.width, facts.height)
    try:
        facts.grid.latent_size(width, height)
    except InputError as error:
        raise InputError(f"{script.place(script.size_line)}: {error}") from None
    if facts.max_size and (width > facts.max_size[0] or height > facts.max_size[1]):
        limit = f"{facts.name} takes at most {facts.max_size[0]} x {facts.max_size[1]}"
        raise InputError(f"{script.place(script.size_line)}: size {width} x {height}: {limit}")
    _check_share(script, settings, facts)
    prompts = {pair: i for i, pair in enumerate(dict.fromkeys((s.prompt, s.negative) for s in script.scenes))}
    spans = _scene_spans(script, fps, prompts)
    num_frames = spans[-1].first_frame + spans[-1].num_frames
    if num_frames > MAX_HOURS * 3600 * fps:
        raise InputError(
            f"{script.path}: the film is {num_frames / fps / 3600:.1f} hours long; {MAX_HOURS} is the most"
        )
    shots: list[Shot] = []
    chunks: list[Chunk] = []
    for _, members in groupby(zip(spans, script.scenes, strict=True), key=lambda member: member[0].shot):
        timeline = _Timeline(script, facts.grid, fps)
        for span, scene in members:
            timeline.add(span, scene)
        _check_image(timeline, facts)
        timeline.complete()
        borders = timeline.borders(ends)
        if borders and not facts.goes_on:
            place = script.place(timeline.spans[-1].line)
            raise InputError(f"{place}: {facts.name} cannot go on with a finished shot: let the scene begin with a cut")
        new_chunks = _shot_chunks(timeline, len(shots), len(chunks), settings, borders)
        if not facts.relative_positions or settings.schedule == "chunks":  # at one step nobody is ahead to have K/V
            new_chunks = [replace(chunk, num_right=0) for chunk in new_chunks]
        _check_limit(new_chunks, settings, facts, script.place(timeline.spans[0].line))
        shots.append(timeline.shot(len(shots), len(chunks), len(new_chunks)))
        chunks += new_chunks
    first_chunk = _num_finished(shots, chunks, facts.grid, ends[-1]) if ends else 0
    if any(chunk.shares is not None and chunk.shares < first_chunk for chunk in chunks[first_chunk:]):
        reason = "the scene before is finished, and its K/V are gone: use blend"
        raise InputError(f"{script.path}: the transition `share` cannot be: {reason}")
    return Plan(
        shots=tuple(shots),
        chunks=tuple(chunks),
        scenes=tuple(spans),
        prompts=tuple(prompt for prompt, _ in prompts),
        negatives=tuple(negative for _, negative in prompts),
        fps=fps,
        width=width,
        height=height,
        num_frames=num_frames,
        seed=script.seed,
        first_chunk=first_chunk,
    )


def _num_finished(shots: list[Shot], chunks: list[Chunk], grid: LatentGrid, end: int) -> int:
    """Chunks of a film that ended at a frame."""
    return sum(chunk.start < grid.num_latents(max(0, end - shots[chunk.shot].first_frame)) for chunk in chunks)


def _scene_spans(script: Script, fps: float, prompts: dict[tuple[str, str], int]) -> list[SceneSpan]:
    spans: list[SceneSpan] = []
    first_frame, shot = 0, -1
    for scene in script.scenes:
        num_frames = scene.duration.frames(fps)
        shot += scene.transition.kind == "cut"
        spans.append(SceneSpan(prompts[scene.prompt, scene.negative], first_frame, num_frames, shot, scene.line))
        first_frame += num_frames
    return spans


@dataclass(frozen=True)
class _Share:
    """Latents of a shot: those of a scene that see how the one before ended, and where that one began."""

    latents: range
    scene_before: int


@dataclass
class _Timeline:
    """The latents of one shot while its scenes are laid out: each latent's prompt and seed."""

    script: Script
    grid: LatentGrid
    fps: float
    spans: list[SceneSpan] = field(default_factory=list)
    prompts: list[PromptBlend] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    shares: list[_Share] = field(default_factory=list)
    scene_start: int = 0
    image: Path | None = None

    def add(self, span: SceneSpan, scene: Scene) -> None:
        """Give the scene the latents whose first frame it holds; those of its blend come first."""
        self.spans.append(span)
        self.image = self.image or scene.image  # only a scene that begins a shot has one
        first_frame = span.first_frame - self.spans[0].first_frame
        # The latents that `n` frames fill are as many as the latents that begin before frame n.
        end = self.grid.num_latents(first_frame + span.num_frames)
        count = end - len(self.prompts)
        if count == 0:
            raise InputError(
                f"{self.script.place(span.line)}: {span.num_frames} frames are too few for a scene without a cut, for a"
                f" latent holds {self.grid.temporal}: make it longer, or cut"
            )
        plain = PromptBlend(span.prompt, span.prompt)
        if scene.transition.kind != "cut":
            change_end = first_frame + transition_frames(self.script, scene, self.fps)
            num_changing = max(1, self.grid.num_latents(change_end) - len(self.prompts))
            if scene.transition.kind == "blend":
                self.prompts += _blend(self.prompts[-1].b, span.prompt, num_changing)
            else:
                first = len(self.prompts)
                self.shares.append(_Share(range(first, first + num_changing), self.scene_start))
        self.scene_start = end - count
        self.prompts += [plain] * (end - len(self.prompts))
        # A scene without a seed goes on with the one before it: only a cut or a new seed changes the noise.
        inherited = self.seeds[-1] if self.seeds else self.script.seed
        self.seeds += [inherited if scene.seed is None else scene.seed] * count

    def borders(self, ends: Sequence[int]) -> list[int]:
        """The latents inside the shot with which it went on after it had ended."""
        first, last = self.spans[0].first_frame, self.spans[-1].first_frame + self.spans[-1].num_frames
        return [self.grid.num_latents(end - first) for end in ends if first < end < last]

    def complete(self) -> None:
        """Add what the last scene needs for a whole shot; its frames are cut off again."""
        missing = self.grid.whole_shot(len(self.prompts)) - len(self.prompts)
        self.prompts += self.prompts[-1:] * missing
        self.seeds += self.seeds[-1:] * missing

    def shot(self, index: int, first_chunk: int, num_chunks: int) -> Shot:
        return Shot(
            index=index,
            first_chunk=first_chunk,
            num_chunks=num_chunks,
            num_latents=len(self.prompts),
            num_frames=sum(span.num_frames for span in self.spans),
            first_frame=self.spans[0].first_frame,
            image=self.image,
        )


def change_prompt(plan: Plan, first: int, prompt: str, negative: str) -> Plan:
    """The plan in which the scene that chunk `first` begins in follows another prompt from there to its end.

    What that chunk sees as left context keeps its own. A blend to the next scene goes over from the new prompt.
    """
    pairs = [*zip(plan.prompts, plan.negatives, strict=True)]
    if (prompt, negative) not in pairs:
        pairs.append((prompt, negative))
    begin, new = plan.chunks[first], pairs.index((prompt, negative))
    old = begin.prompts[begin.num_left].b
    shot = plan.shots[begin.shot]
    later = plan.chunks[first : shot.first_chunk + shot.num_chunks]
    blends = [blend for chunk in later for blend in chunk.prompts[chunk.num_left :]]
    end = next((f for f, blend in enumerate(blends) if old not in (blend.a, blend.b)), len(blends))

    def replaced(prompt: int) -> int:
        return new if prompt == old else prompt

    changed = [replace(blend, a=replaced(blend.a), b=replaced(blend.b)) for blend in blends[:end]] + blends[end:]
    chunks = list(plan.chunks)
    for chunk in later:
        at = chunk.start - begin.start
        kept = chunk.prompts[: max(0, chunk.num_left - at)]
        seen = (*kept, *changed[max(0, at - chunk.num_left) : at + chunk.num_latents])
        chunks[chunk.index] = replace(chunk, prompts=seen)
    prompts, negatives = zip(*pairs, strict=True)
    return replace(plan, chunks=tuple(chunks), prompts=prompts, negatives=negatives)


def _blend(old: int, new: int, num_latents: int) -> list[PromptBlend]:
    if old == new:
        return [PromptBlend(new, new)] * num_latents
    return [PromptBlend(old, new, (j + 1) / (num_latents + 1)) for j in range(num_latents)]


def _shot_chunks(
    timeline: _Timeline, shot: int, first_chunk: int, settings: Settings, borders: list[int]
) -> list[Chunk]:
    sizes = _chunk_sizes(len(timeline.prompts), settings, borders)
    starts = list(accumulate(sizes, initial=0))[:-1]
    noises = _noise(sizes, [timeline.seeds[start] for start in starts], (shot, first_chunk), settings)
    context = settings.queue.context_latents
    chunks = []
    for k, (start, size, (noise_key, noise)) in enumerate(zip(starts, sizes, noises, strict=True)):
        num_left = min(context, start)  # only before a border, a chunk can be shorter than that
        goes_on = k + 1 < len(sizes) and start + size not in borders
        num_right = min(context, sizes[k + 1]) if goes_on else 0
        prompts = tuple(timeline.prompts[start - num_left : start + size])
        chunks.append(Chunk(first_chunk + k, shot, start, size, num_left, num_right, prompts, noise, noise_key))
    for share in timeline.shares:
        _share(chunks, share, context)
    return chunks


def _share(chunks: list[Chunk], share: _Share, context: int) -> None:
    """Have every chunk whose first latent is of the new scene see the last latents of the scene before.

    Those are in the chunk that the new scene finds, `context` latents at the most: as many as any chunk has as left
    context, in whose place they are seen. What else of the new scene that chunk holds sees them anyway.
    """
    readers = [k for k, chunk in enumerate(chunks) if chunk.start in share.latents]
    if not readers:
        return
    source = next(k for k, chunk in enumerate(chunks) if share.latents.start - 1 < chunk.start + chunk.num_latents)
    chunk = chunks[source]
    stop = share.latents.start - chunk.start
    first = max(0, stop - context, share.scene_before - chunk.start)
    chunks[source] = replace(chunk, scene_end=SceneEnd(first, stop, chunks[readers[-1]].index))
    for k in readers:
        chunks[k] = replace(chunks[k], shares=chunk.index)


def _chunk_sizes(num_latents: int, settings: Settings, borders: list[int]) -> list[int]:
    """DualParal's spans: the first chunk has no left context, and owns that many latents more. None is over a border.

    `sequential` has one from border to border.
    """
    sizes: list[int] = []
    for start, stop in pairwise([0, *borders, num_latents]):
        if settings.schedule == "sequential":
            sizes.append(stop - start)
            continue
        size = settings.queue.chunk_latents
        first = min(stop - start, size + settings.queue.context_latents * (start == 0))
        num_full, rest = divmod(stop - start - first, size)
        sizes += [first] + [size] * num_full + [rest] * (rest > 0)
    return sizes


def _check_image(timeline: _Timeline, facts: ModelFacts) -> None:
    place, image = timeline.script.place(timeline.spans[0].line), timeline.image
    if image is None and facts.image == "required":
        raise InputError(f"{place}: {facts.name} makes films of an image: give `image`, here or at the top")
    if image is not None and facts.image == "none":
        raise InputError(f"{place}: {facts.name} takes no image: leave `image` out, or use an image-to-video model")
    if image is not None and not image.is_file():
        raise InputError(f"{place}: image {image}: no such file")


def _check_share(script: Script, settings: Settings, facts: ModelFacts) -> None:
    """Refuse `share` where K/V of one chunk cannot be read by others. At once, every latent sees every other."""
    sharing = next((scene for scene in script.scenes if scene.transition.kind == "share"), None)
    if sharing is None or settings.schedule == "sequential":
        return
    steps, reason = settings.sampler.steps, ""
    if settings.schedule == "chunks":
        reason = "with schedule=chunks all chunks are at one step, and none has K/V for others: use schedule=queue"
    elif not facts.relative_positions:
        reason = f"{facts.name} adds positions to its tokens, so K/V fit no other place"
    elif settings.queue.context_latents == 0:
        reason = "what is shared stands in the place of left context: set queue.context_latents to 1 or more"
    elif not sharing_steps(steps):
        reason = f"it needs sampler.steps of 3 or more, not {steps}"
    elif not isinstance(settings.attention, Dense):
        reason = (
            f"attention.policy must be dense, not {settings.attention.policy}, whose layouts hold one chunk's tokens"
        )
    elif (cache := plan_cache(settings.cache, steps, facts.num_layers)).is_inside:
        what = "negative_every" if cache.skips_negatives else f"policy {settings.cache.policy}"
        reason = f"cache.{what} leaves out layers or tokens whose K/V are to be shared; whole steps may be"
    if reason:
        raise InputError(f"{script.place(sharing.line)}: the transition `share` cannot be: {reason}; or use blend")


def _check_limit(chunks: list[Chunk], settings: Settings, facts: ModelFacts, place: str) -> None:
    for chunk in chunks:
        seen = chunk.num_left + chunk.num_latents + chunk.num_right
        if seen <= facts.max_latents:
            continue
        limit = f"{facts.name} takes at most {facts.max_latents} latents at once"
        if settings.schedule == "sequential":
            raise InputError(
                f"{place}: {limit}, and this shot has {seen}: use schedule=queue, or shorten or cut the shot"
            )
        parts = f"{chunk.num_left} + {chunk.num_latents} + {chunk.num_right} = {seen}"
        raise InputError(f"{limit}, and a chunk sees {parts}: reduce queue.chunk_latents or queue.context_latents")


# --------------------------------------------------------------------------------------------------------------- noise

_Noise = tuple[tuple[int, int], tuple[int, ...]]
"""A chunk's noise key and the draws of its latents."""


def _noise(sizes: list[int], seeds: list[int], where: tuple[int, int], settings: Settings) -> Iterator[_Noise]:
    """The noise of a shot's chunks, whose seeds are given; `where` is the shot and its first chunk in the film."""
    shot, first_chunk = where
    if settings.schedule == "sequential":
        for k, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
            yield (seed, INDEPENDENT_NOISE + first_chunk + k if k else shot), tuple(range(size))
    elif settings.queue.noise == "coordinated":
        yield from _coordinated_noise(sizes, seeds, shot, settings.queue)
    else:
        for k, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
            yield (seed, INDEPENDENT_NOISE + first_chunk + k), tuple(range(size))


def _coordinated_noise(sizes: list[int], seeds: list[int], shot: int, queue: QueueSettings) -> Iterator[_Noise]:
    """DualParal's noise: every chunk reuses the shot's draws, shuffled, but none of its left neighbour's last ones."""
    own, context = queue.chunk_latents, queue.context_latents
    template: tuple[int, ...] = ()
    used = 0
    for k, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
        if k == 0 or seed != seeds[k - 1]:
            template = tuple(range(own + context))
        else:
            start = max(0, used - context)
            last, others = template[start:used], template[:start] + template[used:]
            shuffled = tuple(others[j] for j in _shuffled(len(others), f"{seed}:{k}"))
            room = context - len(last)
            template = shuffled[:room] + last + shuffled[room:]
        used = size if k == 0 else context + size
        yield (seed, shot), template[:size] if k == 0 else template[context:][:size]


def _shuffled(count: int, key: str) -> list[int]:
    # Python keeps `random()` of a seed for ever; it may change `shuffle`.
    rng = random.Random(key)
    return sorted(range(count), key=lambda _: rng.random())
