"""Mixtures of data sets: their grammar, what a configuration means for files, clips for sheets."""

import dataclasses

import numpy as np
import pytest

from sora_jax.data.data_config import DataConfig
from sora_jax.data.encode import natural_clips
from sora_jax.data.footage import Footage
from sora_jax.data.sources import announce, make_sheet_sources, make_sources, read_mixture, summarise
from sora_jax.errors import UserError
from sora_jax.media.video import Video


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Folders whose names hold what the grammar uses, each with a film of two seconds."""
    monkeypatch.chdir(tmp_path)
    for name in ("films", "my,films", "take:2", "films:0.5", "a, b", "films,films"):
        (tmp_path / name).mkdir()
        Video(np.zeros((16, 16, 16, 3), np.uint8), 8).save(tmp_path / name / "a.mp4")
    return tmp_path


@pytest.mark.parametrize(
    "source, mixture",
    [
        ("toyworld", [("toyworld", 1)]),
        ("toyworld:0.7,films:0.3", [("toyworld", 0.7), ("films", 0.3)]),
        (" toyworld , films:2 ", [("toyworld", 1), ("films", 2)]),
        ("my,films", [("my,films", 1)]),
        ("toyworld:.5,my,films:3,films", [("toyworld", 0.5), ("my,films", 3), ("films", 1)]),
        ("films,films", [("films,films", 1)]),
        ("films,films,films", [("films,films", 1), ("films", 1)]),
        ("take:2", [("take:2", 1)]),
        ("take:2:4", [("take:2", 4)]),
        ("films:0.5", [("films:0.5", 1)]),  # a path that exists is taken whole
        ("films:0.25", [("films", 0.25)]),
        ("a, b:2,toyworld:1e-1", [("a, b", 2), ("toyworld", 0.1)]),
        ("films/a.mp4:0,toyworld", [("films/a.mp4", 0), ("toyworld", 1)]),
    ],
)
def test_a_mixture_is_read(films, source, mixture):
    assert read_mixture(source) == mixture


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("", "names nothing"),
        (" ", "names nothing"),
        ("toyworld:0.5,", "names nothing"),
        (",toyworld", "names nothing"),
        ("toyworld,,films", "names nothing"),
        ("toyworld, ,films", "names nothing"),
        (":2", "no data set ':2'"),
        ("moon", "no data set 'moon'"),
        ("toyworld,moon:2", "no data set 'moon:2'"),
        ("toyworld:-1", "weight '-1'"),
        ("toyworld:nan", "weight 'nan'"),
        ("films:half", "weight 'half'"),
        ("toyworld:0,films:0", "weight 0"),
    ],
)
def test_a_mixture_that_says_nothing_is_refused(films, source, sentence):
    with pytest.raises(UserError, match=sentence):
        make_sources(DataConfig(source=source, resolutions=(16,)))


def test_a_configuration_means_for_files_what_it_means_for_toyworld(films):
    config = DataConfig(
        source="films,toyworld",
        clips=30,
        resolutions=(32, 64),
        aspects=("1:1",),
        durations=(0.0, 1.0),
        rates=(4.0, 8.0),
        max_frames=5,
    )
    shapes = []
    for source, _ in make_sources(config):
        clips = [source[index].video for index in range(30)]
        shapes.append({(*clip.frames.shape[:3], clip.fps) for clip in clips if len(clip) > 1})
    assert shapes[0] == shapes[1] == {(5, side, side, fps) for side in (32, 64) for fps in (4, 8)}


@pytest.mark.parametrize("crop", ["square", "letterbox"])
def test_squares_are_the_same_of_files_and_of_toyworld(films, crop):
    shape = {"resolutions": (32,), "aspects": ("16:9",), "durations": (1.0,), "rates": (8.0,)}
    config = DataConfig(source="films,toyworld", clips=8, crop=crop, **shape)
    for source, _ in make_sources(config):
        assert {source[index].video.size for index in range(8)} == {(32, 32)}
    wide = make_sources(dataclasses.replace(config, crop="none"))
    assert all(source[0].video.size[1] > 32 for source, _ in wide)


def test_native_aspects_are_toyworlds_squares():
    config = DataConfig(source="toyworld", resolutions=(32,))
    assert config.shapes() == dataclasses.replace(config, aspects=("1:1",)).shapes()


def test_sheets_show_training_clips_where_none_is_held_out(films):
    config = DataConfig(source="films,toyworld", resolutions=(16,), durations=(1.0,))
    (films_source, held_out), (toyworld, toyworld_held_out) = make_sheet_sources(config, 4)
    assert not held_out and films_source[3].key.startswith("a.mp4")
    assert toyworld_held_out and "validation" in toyworld[0].key
    Video(np.zeros((16, 16, 16, 3), np.uint8), 8).save(films / "films" / "b.mp4")
    [(films_source, held_out), _] = make_sheet_sources(config, 4)
    assert held_out and films_source[3].key.startswith("b.mp4")


def test_the_number_of_clips_follows_from_the_rarest_footage(films):
    config = DataConfig(source="films", resolutions=(16,), durations=(1.0,))
    assert natural_clips(make_sources(config), 20_000) == 16
    assert (
        natural_clips(make_sources(dataclasses.replace(config, source="toyworld:0.75,films:0.25")), 20_000)
        == 64
    )
    assert (
        natural_clips(make_sources(dataclasses.replace(config, source="toyworld:0.75,films:0.25")), 20) == 20
    )
    assert natural_clips(make_sources(dataclasses.replace(config, source="toyworld")), 20_000) == 20_000


def test_what_is_trained_on_is_said_once(films, capsys):
    (films / "films" / "bad.mp4").write_bytes(b"no film")
    sources = make_sources(DataConfig(source="films,toyworld,my,films", resolutions=(16,)))
    announce(sources)
    said = capsys.readouterr().err
    assert said.startswith("data: films: 1 video (2.0 seconds)") and said.count("1 video") == 2
    assert "skipped 1 file that can't be read: films/bad.mp4" in said
    assert summarise(sources).metrics() == {"data/skipped_files": 1, "data/replaced_clips": 0}
    announce(make_sources(DataConfig(source="toyworld")))
    assert capsys.readouterr().err == "" and summarise(make_sources(DataConfig())) is None


def test_the_policy_reaches_the_files(films):
    (films / "films" / "bad.mp4").write_bytes(b"no film")
    [(source, _)] = make_sources(DataConfig(source="films", resolutions=(16,)))
    assert isinstance(source, Footage) and len(source.summary().skipped) == 1
    with pytest.raises(UserError, match="bad.mp4"):
        make_sources(DataConfig(source="films", resolutions=(16,), damaged="refuse"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"aspects": ("abc",)}, "width over height"),
        ({"aspects": ("1:1", "0:1")}, "width over height"),
        ({"split": "foo"}, "no split 'foo'"),
    ],
)
def test_a_value_that_can_t_be_used_is_refused_before_anything_is_opened(fields, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**fields)
