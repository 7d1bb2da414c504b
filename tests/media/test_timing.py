"""Uneven times become an even rate at which every picture that lasts is seen, from the first one on."""

import itertools

import numpy as np
import pytest
from helpers.film_files import numbers, pictures, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sora_jax.media import video as V
from sora_jax.media.reader import read_media
from sora_jax.media.timing import SHORTEST, even_rate, evenly, frame_step


def moments_of(lengths):
    ends = np.cumsum(lengths)
    return [(float(end - length), float(end), i) for i, (end, length) in enumerate(zip(ends, lengths))]


def sampled(lengths, fps=None, start=0.0, average=None):
    """The numbers of the pictures at an even rate, and the rate."""
    moments = moments_of(lengths)
    average = average or len(lengths) / sum(lengths)
    source = even_rate(np.array([begin for begin, _, _ in moments]), sum(lengths), average)
    on = [moment for moment in moments if moment[1] > start + 1e-9]
    shown = list(evenly(iter(on), fps or source, source, start))
    assert all(later[0] == pytest.approx(earlier[1]) for earlier, later in itertools.pairwise(shown))
    assert min(abs(shown[0][0] - on[0][0]), abs(shown[0][0] - start)) <= 0.02
    return [number for _, _, number in shown], source, shown[0][0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
def test_every_picture_that_lasts_is_seen(milliseconds):
    lengths = [number / 1000 for number in milliseconds]
    seen, fps, _ = sampled(lengths)
    wanted = {i for i, length in enumerate(lengths) if length >= SHORTEST}
    if lengths[0] < 0.02 and lengths[1:] and lengths[1] < 2 * SHORTEST:
        wanted -= {1}  # the first comes even where it leaves too little time for the next
    assert wanted <= set(seen) and seen[0] == 0 and seen == sorted(seen)
    assert len(seen) / fps == pytest.approx(sum(lengths), abs=1.3 / fps)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(10, 3000), min_size=1, max_size=12),
    st.floats(1, 60),
    st.floats(0, 0.999),
)
def test_each_instant_shows_what_is_on_show_then(milliseconds, fps, place):
    lengths = [number / 1000 for number in milliseconds]
    start = place * sum(lengths)
    seen, source, base = sampled(lengths, fps, start)
    slack = min(0.26 / source, 0.021)
    for number, index in enumerate(seen):
        begin, end, _ = moments_of(lengths)[index]
        assert begin - slack <= base + number / fps <= end + slack


@pytest.mark.parametrize("fps", [5, 8, 12.5, 15, 24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60])
@pytest.mark.parametrize("tick", [0.0, 0.001, 0.01])
def test_even_files_come_frame_by_frame(fps, tick):
    """Rounded to the container's ticks too, and with a camera's uneven clock."""
    ends = np.arange(301) / fps
    if tick:
        ends = np.round(ends / tick) * tick
    jitter = np.random.default_rng(0).uniform(-1, 1, 301) * min(0.2 / fps, 0.019)
    for times in (ends, ends + np.r_[0, jitter[1:]] * (tick < 0.01)):
        seen, rate, _ = sampled(np.diff(times), average=fps)
        assert rate == fps and seen == list(range(300))


@pytest.mark.parametrize(
    "lengths, fps",
    [
        ([2.5, 0.5], 2),
        ([3, 0.2, 1], 5),
        ([0.1] * 4 + [2] + [0.1] * 3, 10),
        ([0.02] * 20 + [2.0], 24),  # an animation at 50 a second that rests
        ([1 / 15] * 200 + [0.01] + [1 / 15] * 200, 401 / (400 / 15 + 0.01)),  # one bad time among many
        ([60.0, 60.0], 1 / 60),
        ([0.04], 25),
    ],
)
def test_the_rate_is_that_of_the_shorter_pictures(lengths, fps):
    assert sampled(lengths)[1] == pytest.approx(fps)


@pytest.mark.parametrize(
    "fps, most, step",
    [
        (30, 30, 1),
        (30.01, 30, 1),
        (24, 23.976, 1),
        (30.4, 30, 2),
        (60, 30, 2),
        (59.94, 30, 2),
        (61, 30, 3),
        (8, 24, 1),
    ],
)
def test_a_clip_a_little_too_fast_keeps_its_rate(fps, most, step):
    assert frame_step(fps, most) == step


def moving(path, durations):
    """Pictures whose red is 40 a picture."""
    images = [Image.new("RGB", (64, 48), (40 * i, 0, 0)) for i in range(6)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True)
    return path


def reds(video) -> list[int]:
    return [round(int(frame[5, 5, 0]) / 40) for frame in video.frames]


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "avif"])
@pytest.mark.parametrize("durations", [[40, 40, 40, 1000, 40, 40], [20, 500, 500, 500, 500, 20], [100] * 6])
def test_pictures_that_move_begin_with_the_first(tmp_path, kind, durations):
    path = moving(tmp_path / f"a.{kind}", durations)
    assert reds(V.read_video(path, frames=1)) == [0]
    read, seconds = read_media(path), sum(durations) / 1000
    seen = reds(read.video)
    assert seen[0] == 0 and {i for i, ms in enumerate(durations) if ms > 42} <= set(seen)
    assert read.video.duration == pytest.approx(seconds, abs=1 / read.video.fps)
    assert V.probe(path).seconds == pytest.approx(seconds, abs=0.02) and V.probe(path).frames in (6, None)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "avif"])
@pytest.mark.parametrize("milliseconds", [50, 500, 2000])
def test_two_pictures_that_move(tmp_path, kind, milliseconds):
    """FFmpeg gives the ticks of the clock as the rate of so few: 1000 a second, or 100000."""
    images = [Image.new("RGB", (64, 48), (200 * i, 0, 0)) for i in range(2)]
    path = tmp_path / f"a.{kind}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    assert V.probe(path).fps == pytest.approx(1000 / milliseconds, rel=1e-3)
    assert [round(frame[5, 5, 0] / 200) for frame in read_media(path).video.frames] == [0, 1]


@pytest.mark.parametrize("fps, count", [(4, 3), (8, 2), (16, 6), (24, 6)])
def test_the_rate_of_a_short_broadcast(tmp_path, fps, count):
    """FFmpeg doesn't know the average rate of a few pictures in a transport stream."""
    path = write(tmp_path / "a.ts", pictures(count), fps=fps)
    assert V.probe(path).fps == pytest.approx(fps) and numbers(read_media(path).video) == list(range(count))


def test_gif_without_delays_runs_at_ten_a_second(tmp_path):
    video = V.read_video(moving(tmp_path / "a.gif", 0))
    assert (
        reds(video) == list(range(6))
        and video.fps == pytest.approx(10)
        and video.duration == pytest.approx(0.6)
    )


def test_a_still_gif_lasts_as_long_as_it_says(tmp_path):
    image = Image.new("RGB", (64, 48), (40, 0, 0))
    image.save(tmp_path / "a.gif", duration=3000)
    image.save(tmp_path / "b.gif")
    assert (
        V.read_video(tmp_path / "a.gif").duration == pytest.approx(3) == V.probe(tmp_path / "a.gif").seconds
    )
    assert V.read_video(tmp_path / "b.gif").duration == 1
    read = read_media(tmp_path / "a.gif")
    assert len(read.video) == 1 and read.source_frames == 1 and read.notes == ()


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")]
)
def test_slides_in_a_video_are_all_seen(tmp_path, name, codec):
    times = [0, 2500, 2700, 4700, 4800]
    path = write(tmp_path / name, pictures(5), codec=codec, times_ms=times)
    tones = [round(float(frame[-8:, -8:].mean()) / 10) for frame in V.read_video(path).frames]
    assert sorted(set(tones)) == list(range(5)) and tones[0] == 0
