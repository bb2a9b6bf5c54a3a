"""From a job to films on disk: what each goes on from, writers, checkpoints, traces, and what is left of one cut short.

`Engine.render` and its like take orders (`orders.py`) and call it on every rank; frames come from the engine's stream.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from longvid.checkpoint import CheckpointSaver, Holder, LocalBulletin, load_checkpoint, load_ending
from longvid.errors import Interrupted, Preempted
from longvid.events import Notice
from longvid.film_stream import OnEvent
from longvid.ledger import Ledger
from longvid.orders import Orders
from longvid.parallel.chunk_runs import owners_of, readers_of
from longvid.parallel.collectives import StoreBulletin, gather
from longvid.parallel.mesh import describe
from longvid.parallel.schedule import last_round
from longvid.plan import Plan
from longvid.preemption import Preemption
from longvid.rank_model import RankModel
from longvid.render_tools import Tools, make_tools
from longvid.sparsity.runtime import SparseRuntime
from longvid.together import Clip, FilmSavers, FilmSet, Job
from longvid.trace import Trace, summary, summary_text, write_trace


@dataclass(frozen=True)
class Renderer:
    """Renders jobs of one engine. `stream` gives the clips of a plan, `predict` the bubble that is to be expected."""

    model: RankModel
    orders: Orders
    attention: SparseRuntime | None
    stream: Callable[[Plan, OnEvent, Tools], Iterator[Clip]]
    predict: Callable[[Plan], float | None]

    def render(
        self,
        job: Job,
        on_event: OnEvent,
        trace: str | Path | None,
        ledger: str | Path | None,
        preemption: Preemption | None,
    ) -> None:
        """Render a job's films, each from where it is; on every rank. The arguments are those of `Engine.render`."""
        model, mesh = self.model, self.model.mesh
        tools = make_tools(job.plan, model, done=job.done, preemption=preemption or Preemption())
        if trace:
            tools.trace = Trace(mesh.rank, describe(mesh.topology, mesh.rank))
        if ledger:
            tools.ledger = Ledger(Path(ledger) if mesh.is_leader else Path(f"{ledger}.{mesh.rank}"), model.layers)
        holder = self._holder(job.plan)
        tools.saved = [
            load_checkpoint(film.path, film.manifest, holder, model.device) if film.manifest else None
            for film in job.films
        ]
        tools.ended = next(
            (load_ending(film.path, film.ending, model.device) for film in job.films if film.ending), None
        )
        if not mesh.is_leader:
            self._go_on_decoding(tools)
        with FilmSet(job, tools.decoders, on_event, self.orders.keep_ending, tools.lasts) as films:
            if mesh.is_leader:
                films.open(tools.saved, model.settings.output, tools.ended)
            if self.orders.root is not None:
                films.saver = tools.saver = self._make_savers(films, holder, on_event, tools.preemption)
                tools.preemption.is_awaited = True
            self._write(films, on_event, tools)
        if trace and tools.trace:
            self._write_trace(Path(trace), tools.trace, job.plan, on_event)

    def _go_on_decoding(self, tools: Tools) -> None:
        """Put the decoder of a rank besides the leader where checkpoints say."""
        for index, saved in enumerate(tools.saved):
            state = saved.decoder if saved else tools.ended and tools.ended.decoder
            if state and self.model.has_part:
                self.model.decoder.load_state(state)
            elif state and tools.decoders:
                tools.decoders.load(index, state)

    def _holder(self, plan: Plan) -> Holder:
        model = self.model
        owners = owners_of(plan, model.settings, model.mesh.topology.chunk)

        branches = model.stage.branches
        return Holder(
            model.mesh,
            model.layers,
            branches,
            self.attention,
            model.cache,
            owners.__getitem__,
            readers_of(plan, model.settings, model.mesh.topology),
            model.decoder if model.has_part else None,
            model.decodes,
        )

    def _make_savers(self, films: FilmSet, holder: Holder, on_event: OnEvent, preemption: Preemption) -> FilmSavers:
        spans = films.job.plan.films
        bulletin = LocalBulletin() if self.model.mesh.topology.num_ranks == 1 else StoreBulletin()
        savers = [
            CheckpointSaver(
                film.path,
                holder,
                bulletin,
                chunks=span.chunks,
                fingerprint=film.fingerprint,
                film_state=partial(films.state, index),
                on_notice=lambda text: on_event(Notice(text)),
                interval_s=self.model.settings.runtime.checkpoint_s,
                timeout_s=self.model.settings.runtime.timeout_s,
                preemption=preemption,
            )
            for index, (film, span) in enumerate(zip(films.job.films, spans, strict=True))
        ]
        return FilmSavers(spans, [last_round(span, self.model.settings) for span in spans], savers)

    def _write(self, films: FilmSet, on_event: OnEvent, tools: Tools) -> None:
        """Stream the films to their writers."""
        try:
            with contextlib.ExitStack() as stack:
                if films.saver:
                    stack.callback(films.saver.close)
                if tools.ledger:
                    stack.callback(tools.ledger.close)
                for clip in self.stream(films.job.plan, on_event, tools):
                    began = time.monotonic_ns()
                    films.add(clip)
                    if tools.trace:
                        tools.trace.add("write", f"{len(clip.frames)} frames", began, time.monotonic_ns())
            films.finish_ended()
        except KeyboardInterrupt:
            if tools.preemption.is_asked:
                raise Preempted(films.what_is_saved()) from None
            raise Interrupted(films.what_is_left()) from None
        except Preempted:
            raise Preempted(films.what_is_saved() if self.model.mesh.is_leader else "") from None

    def _write_trace(self, path: Path, own: Trace, plan: Plan, on_event: OnEvent) -> None:
        traces = [own] if self.model.mesh.topology.num_ranks == 1 else gather(own)
        if self.model.mesh.is_leader:
            found = {**summary(traces), "predicted_bubble": self.predict(plan)}
            found["costs"] = asdict(costs) if (costs := self.model.costs) else None
            write_trace(path, traces, found)
            on_event(Notice(summary_text(found)))
