"""Films of the drawn world, written to disk, measured against their storyboards, references and chunk borders."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest

from longvid.errors import InputError
from longvid.metrics.film import measure_film
from longvid.metrics.scenes import scene_spans
from longvid.script import parse_script
from longvid.settings import OutputSettings
from longvid.training import world
from longvid.writer import FilmWriter

FIRST = world.Look("red", "blue", "circle", "large", "left")
SECOND = world.Look("green", "white", "square", "small", "orbit")
THIRD = world.Look("yellow", "purple", "diamond", "large", "still", shaded=True)

STORY = f"""
scenes:
  - {{prompt: "{world.caption(FIRST)}", for: 4s}}
  - {{prompt: "{world.caption(SECOND)}", for: 7s, transition: {{kind: blend, over: 1s}}}}
  - {{prompt: "{world.caption(THIRD)}", for: 50f, transition: cut}}
"""


def write(path, frames, scale=1, fps=16):
    height, width = frames.shape[1:3]
    with FilmWriter(path, width=width, height=height, fps=fps, output=OutputSettings(scale=scale)) as writer:
        writer.append(frames)
        return writer.finish()


def shot(looks, lengths, seed=0, side=64):
    """Scenes that blend into each other, drawn as the world does, with 28 frames of change."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])[:-1]
    num_frames = sum(lengths)
    time = np.arange(num_frames)
    arrived = np.stack([np.ones(num_frames), *(np.clip((time - s + 1) / 28, 0, 1) for s in starts[1:]), 0 * time])
    weights = np.ascontiguousarray((arrived[:-1] - arrived[1:]).T.astype(np.float32))
    velocities = np.stack([world.motion_velocity(rng, look.motion, num_frames) for look in looks])
    velocity = np.einsum("tk,ktd->td", weights, velocities).astype(np.float32)
    return world.draw(looks, weights, world.Track((0.4, 0.6), velocity), side)


@pytest.fixture(scope="module")
def frames():
    return np.concatenate([shot([FIRST, SECOND], [64, 112]), shot([THIRD], [50])])


@pytest.fixture(scope="module")
def film(frames, tmp_path_factory):
    return write(tmp_path_factory.mktemp("film") / "film.mp4", frames)


@pytest.fixture(scope="module")
def report(film):
    return measure_film(film, parse_script(STORY, "story.yaml"), reference=film, chunk_borders=range(0, 226, 24))


def test_a_film_that_obeys_is_found_to_obey(report):
    for scene, look in zip(report["scenes"], (FIRST, SECOND, THIRD), strict=True):
        assert {name: scene[name] for name in world.ATTRIBUTES} == look.attributes()
        assert scene["prompt"] == world.caption(look)
        assert scene["ok"] is True
        assert scene["count"] == 1
    assert [scene["first_frame"] for scene in report["scenes"]] == [0, 64, 176]
    assert [scene["frames"] for scene in report["scenes"]] == [64, 112, 50]
    assert report["joint_adherence"] == 1
    assert report["joint_adherence_quarters"] == [1, 1, 1, 1]
    assert report["adherence"] == dict.fromkeys(world.ATTRIBUTES, 1.0)


def test_facts_of_the_file_are_reported_and_everything_is_json(report):
    assert (report["frames"], report["fps"], report["width"], report["height"]) == (226, 16, 64, 64)
    assert report["seconds"] == pytest.approx(226 / 16)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["psnr"] == 100
    assert report["ssim"] == pytest.approx(1)
    assert report["compared_frames"] == 226
    assert 0.9 < report["flicker"] < 1
    assert report["seam_ratio"] == pytest.approx(1, abs=0.4)
    assert set(report["drift"]) >= {"rgb_per_minute", "std_quarters"}


def test_scenes_that_show_something_else_are_found_out(film):
    wrong = STORY.replace("red circle", "red square").replace("orbiting", "moving up")
    report = measure_film(film, parse_script(wrong, "story.yaml"))
    assert [scene["ok"] for scene in report["scenes"]] == [False, False, True]
    assert report["scenes"][0]["matches"] == dict.fromkeys(world.ATTRIBUTES, True) | {"shape": False}
    assert report["scenes"][1]["matches"] == dict.fromkeys(world.ATTRIBUTES, True) | {"motion": False}
    settled = 64 + (112 - 28) + 50
    assert report["joint_adherence"] == pytest.approx(50 / settled)
    assert report["adherence"]["shape"] == pytest.approx((settled - 64) / settled)


def test_a_scene_that_turns_bad_halfway_costs_half(tmp_path):
    good, bad = shot([FIRST], [96]), shot([SECOND], [96])
    path = write(tmp_path / "film.mp4", np.concatenate([good, bad]))
    story = parse_script(f'scenes: [{{prompt: "{world.caption(FIRST)}", for: 192f}}]', "story.yaml")
    report = measure_film(path, story)
    assert report["joint_adherence"] == 0.5
    assert report["joint_adherence_quarters"] == [1, 1, 0, 0]
    assert report["scenes"][0]["joint_adherence"] == 0.5


def test_an_upscaled_film_is_measured_like_the_original(film, frames, report, tmp_path):
    big = write(tmp_path / "big.mp4", frames, scale=4)
    measured = measure_film(big, parse_script(STORY, "story.yaml"), scale=4)
    assert (measured["width"], measured["height"]) == (256, 256)
    for ours, theirs in zip(measured["scenes"], report["scenes"], strict=True):
        assert {n: ours[n] for n in (*world.ATTRIBUTES, "ok")} == {n: theirs[n] for n in (*world.ATTRIBUTES, "ok")}
    assert measured["flicker"] == pytest.approx(report["flicker"], abs=3e-3)


def test_a_seam_is_found(frames, tmp_path):
    jumping = frames[176:].astype(np.int16)
    jumping[25:] += 12
    path = write(tmp_path / "film.mp4", np.clip(jumping, 0, 255).astype(np.uint8))
    assert measure_film(path, chunk_borders=[0, 25])["seam_ratio"] > 10
    assert measure_film(path, chunk_borders=[0, 24])["seam_ratio"] < 1.5
    assert measure_film(path)["seam_ratio"] is None


def test_fidelity_falls_with_the_distance_to_the_reference(film, frames, tmp_path):
    noise = np.random.default_rng(0).normal(0, 10, frames.shape)
    noisy = write(tmp_path / "noisy.mp4", np.clip(frames + noise, 0, 255).astype(np.uint8)[:100])
    report = measure_film(noisy, reference=film)
    assert 24 < report["psnr"] < 34
    assert report["ssim"] < 0.95
    assert report["compared_frames"] == 100


def test_without_a_script_no_scene_is_judged(film):
    report = measure_film(film)
    assert report["scenes"] == []
    assert report["joint_adherence"] is None
    assert report["psnr"] is None


def test_prompts_of_another_world_and_other_formats_are_not_judged(tmp_path):
    wide = np.random.default_rng(0).integers(0, 255, (20, 48, 80, 3)).astype(np.uint8)
    path = write(tmp_path / "film.mp4", wide)
    report = measure_film(path, parse_script('scenes: [{prompt: "a red ring", for: 20f}]', "story.yaml"))
    assert report["scenes"][0]["ok"] is None
    assert report["joint_adherence"] is None
    assert report["flicker"] is not None


def test_a_partial_film_is_measured_as_far_as_it_goes(frames, tmp_path):
    path = write(tmp_path / "film.mp4", frames[:100])
    report = measure_film(path, parse_script(STORY, "story.yaml"))
    assert [scene["frames"] for scene in report["scenes"]] == [64, 36]


def test_scenes_settle_after_their_blend_and_the_worlds_morph():
    spans = scene_spans(parse_script(STORY, "story.yaml"), 16)
    assert [(s.first, s.settled, s.stop) for s in spans] == [(0, 0, 64), (64, 92, 176), (176, 176, 226)]
    brief = STORY.replace("for: 7s", "for: 20f")
    assert scene_spans(parse_script(brief, "story.yaml"), 16)[1].settled == 74


def test_what_is_no_film_is_refused(film, tmp_path):
    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(np.random.default_rng(0).bytes(5000))
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    text = tmp_path / "text.mp4"
    text.write_text("scenes: []")
    for path in (garbage, empty, text, tmp_path, tmp_path / "missing.mp4"):
        with pytest.raises(InputError, match=path.name):
            measure_film(path)
        with pytest.raises(InputError, match=path.name):
            measure_film(film, reference=path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_film_that_is_cut_off_is_refused(film, tmp_path, share):
    content = film.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut\.mp4"):
        measure_film(cut)


def test_a_film_that_is_cut_off_between_two_frames_is_refused(film, tmp_path):
    with av.open(str(film)) as container:
        end = [packet.pos for packet in container.demux(video=0)][100]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[:end])
    with pytest.raises(InputError, match="holds 100 of 226 frames"):
        measure_film(cut)


def test_films_that_cannot_belong_together_are_refused(film, frames, tmp_path):
    small = write(tmp_path / "small.mp4", frames[:5, :32, :32])
    with pytest.raises(InputError, match=r"small\.mp4: is 32 x 32"):
        measure_film(film, reference=small)
    short = parse_script('scenes: [{prompt: "a red ring", for: 20f}]', "story.yaml")
    with pytest.raises(InputError, match=r"226 frames, but story\.yaml asks for 20"):
        measure_film(film, short)
