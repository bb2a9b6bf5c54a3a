"""The command line: options to calls, results to text or JSON, errors to exit codes. It loads torch only to use it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from longvid.batch.commands import batch_app
from longvid.bench_commands import bench_app
from longvid.errors import InputError, Interrupted, LongvidError, Preempted, RuntimeFailure
from longvid.options import (
    AsJson,
    Loras,
    Model,
    Overrides,
    Preset,
    Ray,
    Story,
    all_overrides,
    chosen_settings,
    film_paths,
)
from longvid.results import json_alone, print_json, show
from longvid.train_commands import train_app

_HOW_TO_GO_ON = "the same command with --resume goes on from the last checkpoint"


class _Commands(TyperGroup):
    """Ends what a user can meet with one message and its exit code; any other error is a bug and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LongvidError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
            known = _known(error)
            if known is None:
                raise
            _fail(known)


def _fail(error: LongvidError) -> NoReturn:
    is_wish = isinstance(error, Interrupted | Preempted)
    if str(error):
        typer.echo(f"longvid: {'' if is_wish else 'error: '}{error}", err=True)
    raise typer.Exit(error.exit_code)


def _known(error: BaseException) -> LongvidError | None:
    """What to tell a user of an error; None for a bug."""
    if isinstance(error, LongvidError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # wherever a path is looked at first
        return InputError(f"{error.filename}: {error.strerror}")
    message = _machine_failure(error)
    return RuntimeFailure(message) if message else None


def _machine_failure(error: BaseException) -> str | None:
    """What to say of an error that is the machine's: no memory, no disk. None for others."""
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"the disk is full: {error.filename or error.strerror}" if is_full else None
    # torch has a class for CUDA alone; on a CPU only the text says it.
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "not enough memory" in str(error) or "can't allocate memory" in str(error):
        remedies = "a smaller size, runtime.dtype=bfloat16, fewer queue.chunk_latents, memory.* settings or more ranks"
        return f"out of memory: use {remedies}; longvid plan says what a rank holds, and with --gpu what would fit"
    return None


app = typer.Typer(
    cls=_Commands,
    help="Films of any length from a storyboard, with video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(train_app, name="train")
app.add_typer(batch_app, name="batch")


@app.command()
def render(
    stories: Annotated[list[Path], typer.Argument(metavar="STORY...", help="Storyboards, YAML files.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILM.mp4", help="The film to write; of several, their folder."),
    ],
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
    lora: Loras = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Start so many ranks, on this machine or by --ray.", show_default="1"),
    ] = None,
    ray: Ray = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a render that ended early.")] = False,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep what `longvid extend` needs to add scenes.")
    ] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what every rank did, for Perfetto.")] = None,
    ledger: Annotated[Path | None, typer.Option(metavar="FILE", help="Write hashes of what every unit gave.")] = None,
    log: Annotated[Literal["text", "json"], typer.Option(help="json: one line an event, for machines.")] = "text",
    log_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the log to a file, too.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep progress and pace in a file, for Prometheus.")
    ] = None,
) -> None:
    """Render a storyboard to a film, or several side by side, each to FOLDER/STORY.mp4.

    While it renders, FILM.mp4.longvid/film.m3u8 plays what is finished. Ctrl-C leaves that as FILM.partial.mp4;
    SIGTERM saves the state and ends with 0 within 30 seconds. Under torchrun, mpirun, srun or deepspeed this is one of
    the ranks.
    """
    from longvid.script import load_script
    from longvid.settings import load_settings

    # What is wrong is told before torch is loaded, and by the leader alone.
    keep = ["output.keep_state=true"] if keep_state else []
    chosen = [*all_overrides(model, overrides, lora), *keep]
    settings = load_settings(preset, chosen)
    env = _own_rank(ranks, ray)
    is_leader = env is None or env.rank == 0
    films = film_paths(stories, output)
    scripts = [load_script(story) if is_leader else story for story in stories]
    if is_leader:
        _check_files(films, {"trace": trace, "ledger": ledger, "log-file": log_file, "metrics": metrics}, resume)

    def load() -> Any:
        from longvid.engine import Engine

        return Engine.load(preset=preset, overrides=chosen)

    def work(engine: Any, on_event: Any, preemption: Any) -> None:
        tools: dict[str, Any] = {"trace": trace, "ledger": ledger, "preemption": preemption}
        engine.render_films(scripts, films, on_event, resume=resume, **tools)

    journals = _journals(output, log, log_file, metrics, is_leader=is_leader)
    if ray:
        from longvid.launch.ray import Film

        if len(stories) > 1:
            raise InputError("--ray renders one storyboard; longvid batch --ray renders many")
        _render_on_ray(
            ray, Film(stories[0], output, preset, tuple(chosen), ranks or 1, resume, trace, ledger), journals
        )
        return
    _render_on(env, ranks, settings.model.path, journals, load, work)


@app.command()
def extend(
    film: Annotated[Path, typer.Argument(metavar="FILM.mp4", help="A film that was rendered with --keep-state.")],
    scene: Annotated[str, typer.Option("--scene", metavar="PROMPT", help="What the new scene shows.")],
    length: Annotated[str, typer.Option("--for", metavar="8s", help="How long.")],
    transition: Annotated[Literal["blend", "cut"], typer.Option(help="How it begins.")] = "blend",
    over: Annotated[str | None, typer.Option(metavar="1s", help="Of a blend, how long.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="New noise; else the film's.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="LONGER.mp4", help="The longer film; else in its place.")
    ] = None,
    model: Model = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Start so many ranks on this machine.", show_default="1")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an extension that ended early.")] = False,
    log: Annotated[Literal["text", "json"], typer.Option(help="json: one line an event, for machines.")] = "text",
    log_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the log to a file, too.")] = None,
) -> None:
    """Add a scene to a finished film, which goes on without a seam; its frames stay as they are.

    Model and settings are the film's. Runs under launchers as render does.
    """
    from longvid.ending import Ending
    from longvid.script import parse_scene
    from longvid.settings import load_settings
    from longvid.writer import check_file, check_path

    env, target, chosen = _own_rank(ranks, None), output or film, all_overrides(model, overrides)
    is_leader, model_path = env is None or env.rank == 0, ""
    added = parse_scene(scene, length, transition, over, seed)
    if is_leader:
        check_path(target)
        check_file("--log-file", log_file)
        model_path = load_settings(None, chosen, Ending.read(film).settings).model.path

    def load() -> Any:
        from longvid.engine import Engine

        return Engine.load(film=film, overrides=chosen)

    def work(engine: Any, on_event: Any, preemption: Any) -> None:
        engine.extend(film, [added], target, on_event, resume=resume, preemption=preemption)

    journals = _journals(target, log, log_file, None, is_leader=is_leader)
    _render_on(env, ranks, model_path, journals, load, work)


@app.command("import")
def import_prompts(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="A frame-keyed map, JSON lines, or a list.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STORY.yaml", help="The storyboard to write.")],
    length: Annotated[
        str | None, typer.Option("--for", metavar="8s", help="How long a prompt holds where the file does not say it.")
    ] = None,
    transition: Annotated[
        Literal["blend", "share", "cut"], typer.Option(help="How every scene but the first begins.")
    ] = "blend",
    fps: Annotated[
        float | None, typer.Option(min=1, max=240, help="Of the film; else the file's, or the model's.")
    ] = None,
    line: Annotated[int | None, typer.Option(min=1, help="Which film, where the file holds one a line.")] = None,
) -> None:
    """Make a storyboard of prompts in another program's format.

    Read are maps from frames to prompts ({"0": "...", "48": "..."}, as Deforum has them), LongLive's JSON lines
    ({"prompts": [...], "switch_frames": [...]}, or with "durations" in seconds), and plain lists; YAML or JSON.
    """
    from longvid.importers import Defaults, import_prompts
    from longvid.script import option_duration, storyboard_text
    from longvid.writer import check_file

    check_file("--output", output)
    defaults = Defaults(option_duration("--for", length) if length else None, transition, line, fps)
    script = import_prompts(prompts, defaults)
    output.write_text(storyboard_text(script), encoding="utf-8")
    typer.echo(f"{output}: {len(script.scenes)} scenes")


def _journals(film: Path, log: Any, log_file: Path | None, metrics: Path | None, *, is_leader: bool) -> Any:
    from longvid.journal import Journals

    return Journals(film, log, log_file, metrics) if is_leader else Journals(film)


def _render_on(
    env: Any,
    ranks: int | None,
    model: str,
    journals: Any,
    load: Callable[[], Any],
    render_film: Callable[[Any, Any, Any], None],
) -> None:
    """Render in this process, as one of a launcher's ranks, or on ranks of our own.

    `model` is its path or name. `render_film` takes the engine that `load` gives, a callback for events, and the
    pre-emption that may come.
    """
    from longvid.journal import report, sayer

    is_leader = env is None or env.rank == 0
    if env is None and ranks and ranks > 1:
        from longvid.launch.local import rank_command, run_local
        from longvid.models.facts import hub_model

        arguments, on_hub = sys.argv[1:], hub_model(model)
        if on_hub:  # fetched once, so that all ranks read the same files
            arguments += ["--model", str(on_hub.fetch(weights=True))]
        command = rank_command(arguments)
        raise typer.Exit(run_local(command, ranks, _HOW_TO_GO_ON, sayer(journals), preemptible=True))

    from rich.console import Console

    from longvid.launch.signals import preempted_by_sigterm
    from longvid.preemption import Preemption

    preemption, console = Preemption(), Console(stderr=True, quiet=not is_leader)
    with (
        _ended_by_log(journals.is_stderr_json),
        report(journals, console) as on_event,
        _known_errors(),
        preempted_by_sigterm(preemption, sayer(journals)),
    ):

        def work(engine: Any) -> None:
            render_film(engine, on_event, preemption)

        if env is None or env.world_size == 1:
            work(load())
        else:
            from longvid.launch.worker import run_rank

            run_rank(env, load, work, _HOW_TO_GO_ON, preemption, sayer(journals))


def _check_files(films: list[Path], others: dict[str, Path | None], resume: bool) -> None:
    """Refuse files that cannot be written, and a resume of a single film that cannot be; make the folder of several."""
    from longvid.manifest import find_manifest
    from longvid.writer import check_file, check_path

    if len(films) > 1:
        _make_folder(films[0].parent)
    for film in films:
        check_path(film)
    for option, path in others.items():
        check_file(f"--{option}", path)
    if resume and len(films) == 1:
        find_manifest(films[0])


def _make_folder(folder: Path) -> None:
    """The folder of several films, if it is not there."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made a folder: {error.strerror}") from None


def _own_rank(ranks: int | None, ray: str | None) -> Any:
    """The place that a launcher gave this process, if one did; from now on it ends with its supervisor."""
    from longvid.launch.env import rank_of
    from longvid.launch.local import end_with_supervisor

    env = rank_of(os.environ)
    if env is None:
        return None
    if ray:
        raise InputError(f"--ray, but {env.launcher} started this as rank {env.rank}: start one process without it")
    if ranks and env.world_size != ranks:
        raise InputError(f"--ranks {ranks}, but {env.launcher} started {env.world_size}: leave --ranks out")
    end_with_supervisor(env)
    return env


def _render_on_ray(address: str, film: Any, journals: Any) -> None:
    """Have a Ray cluster render, and show what it does as if this process did it."""
    from rich.console import Console

    from longvid.journal import report
    from longvid.launch.ray import render_film

    with (
        _ended_by_log(journals.is_stderr_json),
        report(journals, Console(stderr=True)) as on_event,
        _known_errors(),
    ):
        render_film(address, film, on_event, _HOW_TO_GO_ON)


@contextlib.contextmanager
def _known_errors() -> Iterator[None]:
    """Errors of the machine as ours, so that the log tells them as the user is told."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        known = None if isinstance(error, LongvidError) else _known(error)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def _ended_by_log(is_told: bool) -> Iterator[None]:
    """Where stderr is a log of JSON, that has told of an error already: no more than the exit code is left."""
    try:
        yield
    except LongvidError as error:
        if not is_told:
            raise
        raise typer.Exit(error.exit_code) from None


@app.command()
def plan(
    story: Story,
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    grid: Annotated[bool, typer.Option("--grid", help="Show which chunk takes which step in which round.")] = False,
    ranks: Annotated[int, typer.Option(min=1, max=65536, help="Show what so many ranks would do.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="CHIP", help="Predict time and memory on accelerators, such as h100-80g.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="How many of them; with --measure, ranks here.")] = 1,
    measured: Annotated[
        bool, typer.Option("--measure", help="Predict for this machine, by a short measurement.")
    ] = False,
) -> None:
    """Show what a render will do and hold. Loads no weights, but for --measure one layer."""
    if gpu or measured:
        if gpu and measured:
            raise InputError("--measure is of this machine, and --gpu names another: give one of them")
        with json_alone():
            from longvid.predict import predict
            from longvid.script import load_script

            outlook = predict(load_script(story), chosen_settings(model, preset, overrides), gpu, gpus)
        show(outlook.as_json(), outlook.as_text(), as_json)
        return
    with json_alone():
        from longvid.overview import Overview
        from longvid.plan import make_plan
        from longvid.script import load_script

        settings, script = chosen_settings(model, preset, overrides), load_script(story)

        from longvid.cache.settings import plan_cache
        from longvid.chips import chip_here
        from longvid.meshes import choose_mesh
        from longvid.models.facts import facts_of, find_model, known_sizes, weight_bytes
        from longvid.models.families import require
        from longvid.models.vin_config import find_vin

        facts = facts_of(settings.model.path)
        require(facts, settings, plan_cache(settings.cache, settings.sampler.steps, facts.num_layers))
        find_vin(settings, facts, find_model(settings.model.path))
        weights = partial(weight_bytes, settings.model.path)
        sizes = known_sizes(settings.model.path) if ranks > 1 else None
        mesh = choose_mesh(ranks, settings, facts, sizes, chip_here(settings))
        overview = Overview.of(make_plan(script, settings, facts), settings, facts, mesh, weights)
        picture = overview.grid() if grid else None
    if as_json:
        print_json({**overview.as_json(), **({"grid": picture.splitlines()} if picture else {})})
    else:
        typer.echo(overview.as_text() + (f"\n\n{picture}" if picture else ""))


@app.command()
def measure(
    film: Annotated[Path, typer.Argument(metavar="FILM", help="The film to measure.")],
    script: Annotated[
        Path | None, typer.Option(metavar="STORY", help="Its storyboard: judge each scene by its prompt, and seams.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="Another film, to tell how near this one is to it.")
    ] = None,
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a film: what its scenes show, how steady it is, how near it is to another.

    With a storyboard, give the model and the settings that the film was rendered with: they say where chunks meet.
    """
    with json_alone():
        settings = chosen_settings(model, preset, overrides)

        from longvid.measure import as_text, measure_render
        from longvid.metrics.film import measure_film
        from longvid.script import load_script

        if script is None:
            result = measure_film(film, None, reference)
        else:
            result = measure_render(film, load_script(script), settings, reference)
    show(result, as_text(result), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has, and what longvid will use of it."""
    with json_alone():
        from longvid.doctor import as_text, examine

        facts = examine()
    show(facts, as_text(facts), as_json)


@app.command()
def tune(
    story: Story,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PROFILE", help="The JSON file to write.")],
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
    chunks: Annotated[int, typer.Option(min=1, help="How many of the film's chunks to look at.")] = 4,
    tile: Annotated[int, typer.Option(min=16, max=256, help="Tokens of a tile.")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Error that a head's pattern may have, as a share of the output's variance (0.05). With sta and tile:"
            " that all may have on average, in place of the density that one option for all has.",
        ),
    ] = None,
) -> None:
    """Search on a film's attention for each head's sparse pattern, for attention.policy=sparse_vdit.

    With attention.policy=sta for each head's window, with tile for each layer's global latents.
    """
    settings = chosen_settings(model, preset, overrides)

    from longvid.sparsity.search import Search
    from longvid.sparsity.settings import Sta, TileFrames
    from longvid.tune import tune as search_heads
    from longvid.writer import check_file

    check_file("--out", out)
    if isinstance(settings.attention, Sta | TileFrames):
        _tune_options(story, settings, out, chunks, tolerance)
        return
    how = Search(tile=tile, tolerance=0.05 if tolerance is None else tolerance)
    profile = search_heads(story, settings, chunks=chunks, how=how, on_chunk=_say_chunk)
    profile.write(out)
    counts = Counter(str(pattern) for heads in profile.layers for pattern in heads)
    typer.echo(", ".join(f"{pattern}: {count}" for pattern, count in sorted(counts.items())))
    typer.echo(f"--set attention.policy=sparse_vdit --set attention.profile={out}")


def _tune_options(story: Path, settings: Any, out: Path, chunks: int, tolerance: float | None) -> None:
    """`tune` for a fixed pattern."""
    from longvid.sparsity.option_search import OptionSearch
    from longvid.tune import tune_options

    how = OptionSearch(settings.attention, tolerance)
    found = tune_options(story, settings, chunks=chunks, how=how, on_chunk=_say_chunk)
    found.write(out)
    typer.echo(f"chosen: density {found.density:.3f}, error {found.error:.4f} of the output's variance")
    typer.echo(f"one for all: density {found.even_density:.3f}, error {found.even_error:.4f}")
    typer.echo(f"--set attention.policy={found.policy} --set attention.profile={out}")


def _say_chunk(done: int, of: int) -> None:
    typer.echo(f"chunk {done} of {of}", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"longvid {version('longvid')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="DeepSpeed's launcher gives it; LOCAL_RANK says it.")
    ] = None,
) -> None: ...


def main() -> None:
    """The console script: exit codes 0, 2 (wrong input), 3 (the machine failed), 130 (interrupted)."""
    from longvid.launch.env import rank_of

    # A service manager's stop is a Ctrl-C: it must leave a film that plays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _quiet_libraries()
    try:
        app(prog_name="longvid")
    except SystemExit as end:
        with contextlib.suppress(InputError):
            if rank_of(os.environ):
                # Threads that wait for other ranks may be left, and an orderly end would free what they use.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else end.code is not None)
        raise


def _quiet_libraries() -> None:
    """Keep the model libraries' warnings and progress bars, which are for their developers, off the terminal."""
    # They read these when they are imported; a user's own choice stays.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
