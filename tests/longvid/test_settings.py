"""Settings: presets, overrides, and messages that name the preset's line or the option."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from longvid.errors import InputError
from longvid.settings import QueueSettings, Settings, load_settings, preset_names


def test_the_default_preset_lists_every_default():
    assert load_settings("default") == load_settings() == Settings()


def test_the_default_preset_leaves_no_setting_out():
    from importlib.resources import files

    import yaml

    listed = yaml.safe_load((files("longvid.configs") / "default.yaml").read_text())
    assert listed == Settings().model_dump()


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name):
    assert load_settings(name).model.path


def test_the_wan_preset_changes_what_it_lists_and_nothing_else():
    wan = load_settings("wan")
    assert (wan.sampler.solver, wan.sampler.steps, wan.sampler.guidance) == ("unipc", 50, 5.0)
    assert wan.output == Settings().output


def test_overrides_win_over_the_preset_and_later_ones_over_earlier_ones(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("sampler:\n  steps: 4\n  guidance: 2\n")
    settings = load_settings(str(preset), ["sampler.steps=5", "sampler.steps=6", "output.keep_state=true"])
    assert (settings.sampler.steps, settings.sampler.guidance, settings.output.keep_state) == (6, 2.0, True)


def test_null_and_scientific_numbers_are_what_yaml_says():
    settings = load_settings(None, ["sampler.shift=null", "output.segment_s=5e-1", "schedule=sequential"])
    assert (settings.sampler.shift, settings.output.segment_s, settings.schedule) == (None, 0.5, "sequential")


def test_a_preset_of_comments_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings(str(tmp_path / "empty.yaml")) == Settings()


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        Settings().queue.chunk_latents = 3


def test_settings_made_in_python_are_validated_too():
    with pytest.raises(ValueError, match="must be at most chunk_latents"):
        QueueSettings(chunk_latents=1)
    with pytest.raises(ValueError, match="did you mean 'context_latents'"):
        QueueSettings(contextlatents=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("queue.chunk_latent=2", "--set queue.chunk_latent=2: .*did you mean 'chunk_latents'"),
        ("quue.chunk_latents=2", "--set quue.chunk_latents=2: .*did you mean 'queue'"),
        ("queue.chunk_latents=1", "--set queue.chunk_latents=1: .*at most chunk_latents .1., not 2"),
        ("queue.chunk_latents=two", "--set queue.chunk_latents=two: .*integer, not 'two'"),
        ("queue.left_level=fresh", "--set queue.left_level=fresh: .*'same' or 'fresher', not 'fresh'"),
        ("sampler.guidance=.nan", "--set sampler.guidance=.nan: .*finite"),
        ("sampler.steps=0", "--set sampler.steps=0: .*at least 1|greater than or equal to 1"),
        ("queue=3", "--set queue=3: queue: must be a mapping"),
        ("queue", "--set queue: must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("a..b=3", "must look like section.key=value"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(InputError, match=message):
        load_settings(None, [override])


def test_a_wrong_line_of_a_preset_is_named(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("sampler:\n  steps: 4\nqueue:\n  contxt: 2\n")
    with pytest.raises(InputError, match=r"mine\.yaml:4: queue: unknown key 'contxt': did you mean 'context_latents'"):
        load_settings(str(preset))


def test_a_scalar_where_a_section_belongs_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("queue: 3\n")
    with pytest.raises(InputError, match=r"mine\.yaml:1: queue: must be a mapping"):
        load_settings(str(tmp_path / "mine.yaml"))
    with pytest.raises(InputError, match=r"--set queue.left=recompute: queue is not a section"):
        load_settings(str(tmp_path / "mine.yaml"), ["queue.left=recompute"])


def test_a_preset_that_is_no_mapping_is_refused_even_with_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text("- 3\n")
    with pytest.raises(InputError, match=r"mine\.yaml:1: must be a mapping"):
        load_settings(str(tmp_path / "mine.yaml"), ["sampler.steps=4"])


@pytest.mark.parametrize(
    ("preset", "message"),
    [("wam", "no such preset, did you mean 'wan'"), ("no/such.yaml", "no/such.yaml: cannot be read"), ("/", "cannot")],
)
def test_a_missing_preset_is_named(preset, message):
    with pytest.raises(InputError, match=message):
        load_settings(preset)


@given(st.text(), st.lists(st.text() | st.builds("{}={}".format, st.text(), st.text()), max_size=3))
def test_no_text_gives_anything_but_settings_or_a_message(preset, overrides):
    for name in (None, preset):
        try:
            assert isinstance(load_settings(name, overrides), Settings)
        except InputError as error:
            assert str(error)


def test_what_does_not_fit_together_is_told_where_it_was_set() -> None:
    message = r"--set queue.chunk_latents=1: queue.context_latents: must be at most chunk_latents \(1\), not 2"
    with pytest.raises(InputError, match=message):
        load_settings(None, ["queue.chunk_latents=1", "queue.gap=2"])
    with pytest.raises(InputError, match=r"--set queue.context_latents=3: queue.context_latents: must be at most"):
        load_settings(None, ["queue.context_latents=3", "queue.chunk_latents=1", "queue.gap=2"])
