"""A batch as one HTML page: every film with pictures, measures and times, and every failure with its reason.

The page stands alone: pictures are inside it. Only the films are files of their own, linked from where the page lies.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import numpy as np
from numpy.typing import NDArray

from longvid.batch.folder import BatchFolder
from longvid.batch.status import counts_of, line_of
from longvid.batch.table import Row, Table
from longvid.document import Document
from longvid.errors import InputError
from longvid.hls import write_whole
from longvid.measure import measure_render
from longvid.metrics.reader import FilmReader
from longvid.progress import clock_time
from longvid.script import script_of
from longvid.settings import Settings

PICTURES = 6
PICTURE_WIDTH = 160
"""Of each picture on a contact sheet, in pixels, at most."""

Image = NDArray[np.uint8]


def write_report(folder: Path, path: Path) -> list[str]:
    """Write the page of a batch. Films are measured once, and the table keeps it. What could not be read.

    Raises InputError where there is no batch, or the page cannot be written.
    """
    table, places = Table.find(folder), BatchFolder(folder)
    problems: list[str] = []
    for row in table.rows():
        if row.state == "done" and row.measures is None:
            try:
                table.keep_measures(row.name, look_at(places.film(row.name), row, table))
            except InputError as error:
                problems.append(str(error))
    try:
        write_whole(path, page(table.rows(), folder, path).encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return problems


def look_at(film: Path, row: Row, table: Table) -> dict[str, Any]:
    """A film's measures (those of `longvid measure`), and its contact sheet as a JPEG in base64."""
    settings = Settings.model_validate_json(table.settings(row.settings))
    measured = measure_render(film, script_of(Document(row.place, row.story)), settings, None)
    sheet = contact_sheet(film, measured["frames"])
    return {**measured, "sheet": base64.b64encode(jpeg_of(sheet)).decode(), "bytes": film.stat().st_size}


def contact_sheet(film: Path, num_frames: int, pictures: int = PICTURES) -> Image:
    """Frames from the whole film side by side, black lines between them: uint8 [height, width, 3]."""
    wanted = {round((i + 0.5) * num_frames / pictures - 0.5) for i in range(pictures)}
    with FilmReader(film) as reader:
        kept = [frame for index, frame in enumerate(reader.frames()) if index in wanted]
    small = [_shrink(frame) for frame in kept]
    line = np.zeros((small[0].shape[0], max(1, small[0].shape[1] // 40), 3), np.uint8)
    return np.concatenate([part for frame in small for part in (frame, line)][:-1], axis=1)


def _shrink(image: Image) -> Image:
    height, width = image.shape[:2]
    if width <= PICTURE_WIDTH:
        return image
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    small = frame.reformat(width=PICTURE_WIDTH, height=max(2, round(height * PICTURE_WIDTH / width)))
    return np.asarray(small.to_ndarray(format="rgb24"), np.uint8)


def jpeg_of(image: Image) -> bytes:
    """An image as a JPEG. Sides are cut to even numbers, as its colours need."""
    height, width = (side - side % 2 for side in image.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"qmin": "2", "qmax": "4"}
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame.reformat(format="yuvj420p")), *encoder.encode()))


# ------------------------------------------------------------------------------------------------------------- the page


def page(rows: Sequence[Row], folder: Path, path: Path) -> str:
    """The whole page; links to films lead from `path`."""
    failed = [row for row in rows if row.state == "failed"]
    films = [row for row in rows if row.state == "done"]
    others = [row for row in rows if row.state in ("waiting", "running")]
    base = os.path.relpath(folder.absolute(), path.absolute().parent)
    parts = [_summary(rows)]
    if failed:
        parts.append(_section("Failed", "".join(_failure(row) for row in failed), "failures"))
    if films:
        parts.append(_section("Films", "".join(_film(row, base) for row in films), "films"))
    if others:
        waiting = "".join(f"<li>{escape(row.name)} <span>{_standing(row)}</span></li>" for row in others)
        parts.append(_section("Not done yet", f"<ul>{waiting}</ul>", "others"))
    title = escape(f"{folder.absolute().name}: {len(films)} of {len(rows)} films")
    return _PAGE.format(title=title, name=escape(folder.absolute().name), style=_STYLE, body="\n".join(parts))


def _summary(rows: Sequence[Row]) -> str:
    counts = counts_of(rows)
    seconds = [row.result["seconds"] for row in rows if row.result.get("seconds")]
    measured = [row.measures for row in rows if row.measures]
    film_s = sum(found["seconds"] for found in measured)
    joint = [found["joint_adherence"] for found in measured if found["joint_adherence"] is not None]
    facts = [(f"{counts['done']} / {len(rows)}", "films done")]
    facts += [(str(counts[state]), state) for state in ("failed", "running", "waiting") if counts[state]]
    facts += [(clock_time(film_s), "of film")] if measured else []
    facts += [(clock_time(sum(seconds)), "of work")] if seconds else []
    facts += [(f"{sum(joint) / len(joint):.0%}", "of scenes obey their prompts")] if joint else []
    lost = sum(row.lost for row in rows)
    facts += [(str(lost), "workers lost")] if lost else []
    return f'<dl class="facts">{"".join(f"<div><dd>{v}</dd><dt>{escape(k)}</dt></div>" for v, k in facts)}</dl>'


def _section(title: str, content: str, kind: str) -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{content}</section>'


def _failure(row: Row) -> str:
    why = "for its own reason" if row.cause == "input" else f"after {row.lost} workers died"
    return (
        f'<article><h3>{escape(row.name)}</h3><p class="why">{why}</p><pre>{escape(row.reason or "")}</pre></article>'
    )


def _standing(row: Row) -> str:
    return escape(line_of(row).removeprefix(f"{row.name}: "))


def _film(row: Row, base: str) -> str:
    found = row.measures
    link = quote(Path(base, f"{row.name}.mp4").as_posix())
    sheet = ""
    if found:
        source = f"data:image/jpeg;base64,{found['sheet']}"
        alt = escape(f"frames of {row.name}")
        sheet = f'<a href="{link}"><img src="{source}" alt="{alt}" loading="lazy"></a>'
    prompts = dict.fromkeys(scene.get("prompt", "") for scene in row.story.get("scenes", []))
    text = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in prompts)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in row.result.get("notices", []))
    heading = f'<h3><a href="{link}">{escape(row.name)}</a></h3>'
    return f'<article>{sheet}{heading}<ol class="prompts">{text}</ol>{_numbers(row)}{notes}</article>'


def _numbers(row: Row) -> str:
    found, seconds = row.measures, row.result.get("seconds")
    values: list[tuple[str, str]] = []
    if found:
        values.append(("length", f"{found['seconds']:.1f} s, {found['frames']} frames"))
        values.append(("picture", f"{found['width']} × {found['height']}, {found['fps']:g} fps"))
        values.append(("size", _size(found["bytes"])))
    if seconds:
        values.append(("work", f"{seconds:.1f} s"))
    if row.attempt > 1:
        how = "from a checkpoint" if row.result.get("resumed") else "anew"
        values.append(("worker", f"number {row.attempt}, {how}"))
    if found:
        scenes = [scene["ok"] for scene in found["scenes"] if scene["ok"] is not None]
        if scenes:
            values.append(("scenes obeyed", f"{sum(scenes)} of {len(scenes)}"))
        named = (("seams", "seam_ratio"), ("flicker", "flicker"))
        values += [(name, f"{found[key]:.2f}") for name, key in named if found[key] is not None]
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{escape(value)}</dd></div>' for name, value in values)}</dl>"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><p>longvid batch</p><h1>{name}</h1></header>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --page: #fafaf8; --card: #fff; --ink: #1b1c1e; --soft: #63666b;
  --line: #e3e3df; --link: #1d4f91; --bad: #a32018;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141516; --card: #1c1e20; --ink: #e8e8e6; --soft: #9b9ea3;
    --line: #303337; --link: #8db8f0; --bad: #f08a80;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px }
header { padding-top: 28px }
header p { margin: 0; color: var(--soft); font-size: 13px }
h1 { margin: 0 0 12px; font-size: 26px; font-weight: 600; overflow-wrap: anywhere }
h2 { margin: 32px 0 12px; font-size: 17px; font-weight: 600 }
h3 { margin: 0; font-size: 15px; font-weight: 600; overflow-wrap: anywhere }
a { color: var(--link); text-decoration: none }
a:hover { text-decoration: underline }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 0; padding: 12px 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line) }
.facts dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums }
.facts dt { color: var(--soft); font-size: 13px }
.films { padding-bottom: 40px }
.films h2 { grid-column: 1 / -1; margin-bottom: 0 }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 16px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 14px; min-width: 0 }
.films article { padding: 0 0 12px; overflow: hidden }
.films article > :not(a) { margin-left: 14px; margin-right: 14px }
.films img { display: block; width: 100%; margin-bottom: 10px; background: var(--line) }
.prompts { margin-top: 2px; margin-bottom: 8px; padding: 0; list-style: none; color: var(--soft);
  overflow-wrap: anywhere; max-height: 7.5em; overflow-y: auto }
article dl { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; font-size: 13px }
article dl div { display: flex; gap: 6px }
article dt { color: var(--soft) }
article dd { margin: 0; font-variant-numeric: tabular-nums }
.note { margin: 6px 0 0; font-size: 13px; color: var(--soft) }
.failures article { border-left: 3px solid var(--bad); margin-bottom: 10px }
.why { margin: 0 0 6px; color: var(--bad); font-size: 13px }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.others ul { margin: 0; padding: 0; list-style: none }
.others li { padding: 6px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
.others span { color: var(--soft) }
"""
