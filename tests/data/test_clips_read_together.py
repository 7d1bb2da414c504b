"""Clips that are read together are those that are read alone, and nothing is decoded twice for them."""

from fractions import Fraction

import numpy as np
import pytest
from helpers.film_files import pictures, write

from sora_jax.data import reading
from sora_jax.data.footage import Footage
from sora_jax.media import video
from sora_jax.media.clip import read_clips

FIELDS = {"resolution": (16, 32), "durations": (0.0, 0.4, 1.0), "multiple": 8, "clips": 60}


def moving(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.roll(rng.integers(0, 256, (48, 64, 3), np.uint8), i, 1) for i in range(count)]


def assert_same(footage: Footage, indices) -> None:
    read = dict(read_clips(footage, indices))
    assert sorted(read) == sorted(indices)
    for index, clip in read.items():
        alone = footage[index]
        assert (clip.key, clip.captions, clip.video.fps) == (alone.key, alone.captions, alone.video.fps)
        np.testing.assert_array_equal(clip.video.frames, alone.video.frames)


@pytest.mark.parametrize("rates", [(), (8.0, 25.0), (10.0,)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_together_they_are_what_they_are_alone(tmp_path, rates, suffix):
    for name, count in (("a", 90), ("b", 60)):
        write(tmp_path / f"{name}.{suffix}", moving(count))
        (tmp_path / f"{name}.txt").write_text(f"film {name}")
    footage = Footage(str(tmp_path), rates=rates, **FIELDS)
    assert_same(footage, range(30))
    assert_same(footage, [7, 3, 58])


def test_uneven_times_and_random_windows_too(tmp_path):
    times = np.cumsum([40, 40, 20, 60, 40, 80, 10, 30] * 10).tolist()
    write(tmp_path / "a.mkv", pictures(80), times_ms=times)
    assert_same(Footage(str(tmp_path), rates=(12.5, 25.0), **FIELDS), range(20))
    crop = FIELDS | {"crop": (5, 16, 16)}
    assert_same(Footage(str(tmp_path), **crop), range(20))


def test_pictures_and_cached_files_too(tmp_path):
    write(tmp_path / "a.mp4", moving(60))
    video.Video(moving(1)[0][None], 1.0).save(tmp_path / "still.png")
    assert_same(Footage(str(tmp_path), cache=str(tmp_path / "cache"), **FIELDS), range(20))
    assert_same(Footage(str(tmp_path), **FIELDS), range(20))


def test_a_jump_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "JUMP_SECONDS", 0.2)
    write(tmp_path / "a.mp4", moving(120))
    assert_same(Footage(str(tmp_path), **FIELDS), range(6))


def test_damage_is_met_as_it_is_alone(tmp_path, capsys):
    path = tmp_path / "a.mp4"
    write(path, moving(120))
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 3000):
        content[place] ^= 0x5A
    path.write_bytes(bytes(content))
    assert_same(Footage(str(tmp_path), **FIELDS), range(30))
    assert "Other clips take its place" in capsys.readouterr().err


def test_nothing_is_decoded_or_scaled_twice(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", moving(60))
    fields = FIELDS | {"resolution": 16, "durations": (1.0,)}
    footage = Footage(str(tmp_path), **fields)
    opened, scaled = [], []
    own_reader, own_resample = reading.open_reader, reading.resample
    monkeypatch.setattr(reading, "open_reader", lambda *args: opened.append(1) or own_reader(*args))
    monkeypatch.setattr(reading, "resample", lambda *args: scaled.append(1) or own_resample(*args))
    clips = dict(footage.read(range(40)))
    assert len(opened) == 1 and len(scaled) <= 60 < sum(len(clip.video.frames) for clip in clips.values())


@pytest.mark.slow
@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 25, 30, Fraction(24000, 1001), 8])
def test_no_clip_of_a_healthy_film_is_taken_for_damaged(tmp_path, fps):
    write(tmp_path / "a.mp4", moving(50), fps=fps)
    footage = Footage(str(tmp_path), **FIELDS | {"durations": (0.0, 1.0, 2.0, 3.0), "rates": (8.0, 24.0)})
    assert_same(footage, range(60))
    assert footage.summary().replaced == 0
