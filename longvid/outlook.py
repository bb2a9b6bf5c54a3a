"""The outlook: which mesh of which accelerators suits a film, how long it takes, what ranks hold, what else would do.

From configs, settings and a storyboard alone, by the meshes of `longvid.meshes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from longvid.chips import CHIPS
from longvid.errors import InputError
from longvid.machines import ChipMachine, Machine
from longvid.memory import StageMemory
from longvid.meshes import Film, Option, options
from longvid.parallel.topology import AXES, Topology
from longvid.settings import Settings

SHOWN = 8
"""Meshes in the table."""
MOST_RANKS = 1024
"""Up to which more ranks are tried."""
VAE_ROWS = 8
"""Rows of latents at a time that are tried where the decoder takes too much."""


@dataclass(frozen=True)
class Remedy:
    """A change that would make a film fit: on the fullest rank, `held_gb` of `memory_gb`."""

    change: str
    held_gb: float
    memory_gb: float

    def __str__(self) -> str:
        return f"{self.change:60}  {self.held_gb:.1f} GB, of {self.memory_gb:.1f} GB"


@dataclass(frozen=True)
class Outlook:
    """All meshes for a number of ranks, and where none fits, what would.

    `taken` is what a render takes by itself; None: it refuses these settings.
    """

    film: Film
    machine: Machine
    num_ranks: int
    taken: Topology | None
    options: tuple[Option, ...]
    remedies: tuple[Remedy, ...]

    @classmethod
    def of(
        cls,
        film: Film,
        machine: Machine,
        num_ranks: int,
        taken: Topology | None,
        replan: Callable[[Settings], Film],
    ) -> Outlook:
        """`replan` lays the storyboard out anew for other settings."""
        found = tuple(options(film, machine, num_ranks))
        fits = any(option.reason is None for option in found)
        remedies = () if fits else tuple(_remedies(film, machine, num_ranks, replan))
        return cls(film, machine, num_ranks, taken, found, remedies)

    @property
    def best(self) -> Option | None:
        """The best that fits."""
        return self.options[0] if self.options and self.options[0].reason is None else None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; seconds, 10^6 bytes, 10^15 operations."""
        film, best = self.film, self.best
        return {
            "model": film.facts.name,
            "machine": self.machine.name,
            "memory_gb": self.machine.memory_gb,
            "ranks": self.num_ranks,
            "frames": film.plan.num_frames,
            "seconds": film.plan.num_frames / film.plan.fps,
            "chunks": len(film.plan.chunks),
            "steps": film.steps,
            "pflops": film.flops.each_step / 1e15,
            "attention_pflops": film.flops.attention / 1e15,
            "decode_pflops": film.decode_flops / 1e15,
            "fits": best is not None,
            "best": _option_json(best) if best else None,
            "taken": _mesh_json(self.taken) if self.taken else None,
            "options": [_option_json(option) for option in self.options],
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }

    def as_text(self) -> str:
        """The same for people."""
        return "\n".join([*self._head(), "", *self._body()])

    def _head(self) -> Iterator[str]:
        film, plan = self.film, self.film.plan
        length = f"{plan.num_frames / plan.fps:.1f} s, {plan.num_frames} frames of {plan.width} x {plan.height}"
        yield f"film      {length} at {plan.fps:g} fps, {len(plan.chunks)} chunks × {film.steps} steps"
        yield f"model     {film.facts.name}: {film.sizes.params / 1e9:.2f} B parameters" + (
            f" × {film.sizes.num_experts} experts" if film.sizes.num_experts > 1 else ""
        )
        flops, decode = film.flops, film.decode_flops / 1e15
        share = 100 * flops.attention / flops.each_step
        work = f"{flops.each_step / 1e15:.4g} PFLOP, {share:.0f} % of it attention"
        yield f"work      {work}; decoding {decode:.3g} PFLOP"
        yield f"machine   {self.num_ranks} × {self.machine.name}, {self.machine.memory_gb:.1f} GB a rank"
        yield from (f"          {note}" for note in self.machine.notes)

    def _body(self) -> Iterator[str]:
        best = self.best
        if best is None:
            yield "does not fit"
            for option in self.options[:SHOWN]:
                yield f"  {_axes(option.topology):40}{option.reason}"
            yield "it would fit with"
            yield from (f"  {remedy}" for remedy in self.remedies or ("nothing that was tried",))
            return
        assert best.pace
        yield f"best      {_axes(best.topology)}: {as_set(best.topology)}"
        if self.taken is None:
            yield "by itself a render refuses these settings: add the above"
        elif self.taken != best.topology:
            yield f"by itself {_axes(self.taken)} is what a render takes, whatever the film"
        yield f"time      {duration(best.seconds)}, first frames after {duration(best.pace.first)}"
        work = self.film.plan.num_frames / self.film.plan.fps
        yield f"pace      {best.seconds / work:.2f} s a second of film, bubble {best.pace.bubble * 100:.1f} %"
        yield from _memory_table(best.memory)
        yield ""
        yield f"{'mesh':40}{'time':>10}{'first':>10}{'GB':>8}"
        for option in self.options[:SHOWN]:
            yield _row(option, best).rstrip()
        if len(self.options) > SHOWN:
            yield f"and {len(self.options) - SHOWN} more (--json lists them)"


def _mesh_json(topology: Topology) -> dict[str, int]:
    return {**dict(zip(AXES, topology.sizes, strict=True)), "ring": topology.ring}


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "mesh": _mesh_json(option.topology),
        "reason": option.reason,
        "seconds": option.pace.makespan if option.pace else None,
        "first_frames_s": option.pace.first if option.pace else None,
        "bubble": option.pace.bubble if option.pace else None,
        "layers": [[span.start, span.stop] for span in option.bounds],
        "memory": [asdict(stage) for stage in option.memory],
        "worst_mb": option.worst_mb,
    }


def _axes(topology: Topology) -> str:
    parts = [f"stage {topology.stage}", f"guidance {topology.guidance}", f"seq {topology.seq}"]
    return " × ".join(parts) + (f" (ring {topology.ring})" if topology.ring > 1 else "")


def as_set(topology: Topology) -> str:
    """The options of `longvid render` that choose a mesh."""
    sizes = {"stage": topology.stage, "guidance": topology.guidance, "seq": topology.seq}
    if topology.ring > 1:
        sizes["ring"] = topology.ring
    return " ".join(f"--set mesh.{axis}={size}" for axis, size in sizes.items())


def duration(seconds: float) -> str:
    """Seconds for people, to three digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _memory_table(memory: Sequence[StageMemory]) -> Iterator[str]:
    """Stages that hold the same are one line."""
    kinds = {"weights": "weights", "kv": "K/V", "activations": "activations", "latents": "latents", "cache": "cache"}
    kinds |= {"vae": "VAE", "text": "text encoder"}
    rows: list[tuple[int, int, StageMemory]] = []
    for index, stage in enumerate(memory):
        if rows and rows[-1][2] == stage:
            rows[-1] = (rows[-1][0], index, stage)
        else:
            rows.append((index, index, stage))
    for first, last, stage in rows:
        values = {label: getattr(stage, f"{kind}_mb") for kind, label in kinds.items()}
        parts = ", ".join(f"{label} {value / 1e3:.3g}" for label, value in values.items() if value)
        name = f"stage {first}" if first == last else f"stages {first}-{last}"
        yield f"{name:12}{stage.total_mb / 1e3:.3g} GB: {parts}"


def _row(option: Option, best: Option) -> str:
    gb = f"{option.worst_mb / 1e3:8.1f}" if option.memory else f"{'-':>8}"
    if not option.pace:
        return f"{_axes(option.topology):40}{'-':>10}{'-':>10}{gb}  {option.reason}"
    times = f"{duration(option.seconds):>10}{duration(option.pace.first):>10}"
    return f"{_axes(option.topology):40}{times}{gb}  {_why(option, best)}"


def _why(option: Option, best: Option) -> str:
    """Why a mesh lost."""
    assert option.pace and best.pace
    if option is best:
        return ""
    slower = f"{option.seconds / best.seconds:.2f}x"
    busiest, lost = max(option.pace.busy), option.pace.bubble - best.pace.bubble
    if lost > 0.1 and busiest < 0.9 * option.seconds:
        return f"{slower}: ranks wait {option.pace.bubble * 100:.0f} % of the time (too few units in flight)"
    if lost > 0.02:
        return f"{slower}: stages are uneven or wait, bubble {option.pace.bubble * 100:.0f} %"
    if option.topology.seq > best.topology.seq:
        return f"{slower}: exchange of tokens"
    return slower


def _remedies(film: Film, machine: Machine, num_ranks: int, replan: Callable[[Settings], Film]) -> Iterator[Remedy]:
    """What would make it fit, one change at a time: of each kind, the least that does."""

    def try_out(change: str, film: Film, machine: Machine, num_ranks: int) -> Remedy | None:
        fitting = [option for option in options(film, machine, num_ranks, with_pace=False) if option.reason is None]
        held = min((option.worst_mb for option in fitting), default=None)
        return None if held is None else Remedy(change, held / 1e3, machine.memory_gb)

    def try_settings(settings: Settings, text: str) -> Remedy | None:
        try:
            other = replan(settings)
        except InputError:  # not with this model
            return None
        again = machine
        if isinstance(machine, ChipMachine):
            again = replace(machine, sizes=other.sizes, itemsize=other.itemsize)
        return try_out(text, other, again, num_ranks)

    alone, together = _memory_changes(film.settings)
    found = [remedy for change, text in alone if (remedy := try_settings(change, text))]
    yield from found or _first(try_settings(change, text) for change, text in together)
    for kind in _changes(film.settings):
        yield from _first(try_settings(change, text) for change, text in kind)
    doublings = [num_ranks << doubling for doubling in range(1, MOST_RANKS.bit_length())]
    more = (count for count in doublings if count <= MOST_RANKS)
    yield from _first(try_out(f"{count} of them", film, machine, count) for count in more)
    if isinstance(machine, ChipMachine):
        larger = sorted((chip for chip in CHIPS if chip.memory_gb > machine.chip.memory_gb), key=lambda c: c.memory_gb)
        others = ((f"--gpu {chip.name}", replace(machine, chip=chip)) for chip in larger)
        yield from _first(try_out(text, film, other, num_ranks) for text, other in others)


def _first(tried: Iterator[Remedy | None]) -> list[Remedy]:
    """The first that does, if any."""
    return [remedy for remedy in tried if remedy][:1]


Change = tuple[Settings, str]
"""Other settings, and as `--set` says them."""


def _memory_changes(settings: Settings) -> tuple[list[Change], list[Change]]:
    """Other settings of memory: each alone, and more and more of them together."""
    memory = settings.memory

    def of_memory(**values: int | str) -> Change:
        text = " ".join(f"--set memory.{key}={value}" for key, value in values.items())
        return settings.model_copy(update={"memory": memory.model_copy(update=values)}), text

    steps: list[dict[str, int | str]] = []
    if memory.text_encoder == "keep":
        steps.append({"text_encoder": "free"})
    if not memory.vae_rows:
        steps.append({"vae_rows": VAE_ROWS})
    if memory.quantize == "none":
        steps.append({"quantize": "int8"})
    if memory.offload == "none":
        steps.append({"offload": "host"})
    counts = range(2, len(steps) + 1)
    together = [of_memory(**dict(pair for step in steps[:count] for pair in step.items())) for count in counts]
    return [of_memory(**step) for step in steps], together


def _changes(settings: Settings) -> Iterator[list[Change]]:
    """Other settings that take less memory, each as `--set` says it; by kind, the least change first."""
    queue = settings.queue

    def of_queue(**values: int | str) -> Change:
        text = " ".join(f"--set queue.{key}={value}" for key, value in values.items())
        return settings.model_copy(update={"queue": queue.model_copy(update=values)}), text

    if settings.runtime.dtype == "float32":
        runtime = settings.runtime.model_copy(update={"dtype": "bfloat16"})
        yield [(settings.model_copy(update={"runtime": runtime}), "--set runtime.dtype=bfloat16")]
    if settings.schedule == "sequential":
        yield [(settings.model_copy(update={"schedule": "queue"}), "--set schedule=queue")]
        return
    if queue.left == "cached":
        yield [of_queue(left="recompute")]
    sizes = [queue.chunk_latents >> halvings for halvings in range(1, queue.chunk_latents.bit_length())]
    yield [of_queue(chunk_latents=size, context_latents=min(queue.context_latents, size)) for size in sizes]
    yield [of_queue(context_latents=queue.context_latents >> halvings) for halvings in range(1, 4)]
    gaps = [queue.gap << doublings for doublings in range(1, 7)]
    yield [of_queue(gap=gap) for gap in gaps if gap <= settings.sampler.steps]
