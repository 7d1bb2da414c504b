"""Footage: clips of the right frames, shapes and words, the same every time, and never of the other split."""

import fractions
import pathlib
import pickle

import numpy as np
import pytest
from helpers.film_files import pictures, write
from PIL import Image

from sora_jax.data.cuts import rate_ratio
from sora_jax.data.footage import EmptySplit, Footage
from sora_jax.errors import UserError
from sora_jax.media.video import Video

BUNNY = pathlib.Path(__file__).parents[3] / "shared/footage/big_buck_bunny_000-400s_270p.mp4"


def counting(seconds: float, fps: float, height: int, width: int) -> Video:
    """A video whose brightness tells the second, and whose left half is 60 brighter in odd frames."""
    count = round(seconds * fps)
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (np.arange(count) / fps).astype(int)[:, None, None, None]
    frames[1::2, :, : width // 2] += 60
    return Video(frames, fps)


def second(frame: np.ndarray) -> int:
    return round(float(frame[:, -8:].mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Eighty seconds wide, thirty tall and fast, ten small: twelve blocks, of which the fifth is held out."""
    root = tmp_path_factory.mktemp("footage")
    counting(80, 8, 36, 64).save(root / "a.mp4")
    (root / "a.txt").write_text("numbers  that\ngrow\n", encoding="utf-8")
    (root / "deeper").mkdir()
    counting(30, 20, 64, 36).save(root / "deeper" / "b.mp4")
    counting(10, 10, 40, 40).save(root / "deeper" / "c.mp4")
    return str(root)


def test_clips_have_the_shapes_that_are_asked_for(folder):
    source = Footage(folder, resolution=32, max_fps=10, min_seconds=1, max_seconds=3, clips=60)
    assert len(source) == 60
    clips = [source[i] for i in range(60)]
    assert {clip.key.split("@")[0] for clip in clips} == {"a.mp4", "deeper/b.mp4", "deeper/c.mp4"}
    for clip in clips:
        # Every second frame of the fast one; native aspect ratio, cropped to eights.
        size, fps = {
            "a.mp4": ((32, 56), 8),
            "deeper/b.mp4": ((56, 32), 10),
            "deeper/c.mp4": ((32, 32), 10),
        }[clip.key.split("@")[0]]
        assert clip.video.size == size and clip.video.fps == pytest.approx(fps)
        assert len(clip.video) % 4 == 1
        assert 1 - 4 / fps <= clip.video.duration <= 3
        if clip.key.startswith("a.mp4"):
            assert clip.captions == {"short": "numbers that grow"}
            assert clip.timed == ((0.0, "numbers that grow"),)
        else:
            assert clip.captions == {"short": ""} and clip.timed == ()
    assert len({len(clip.video) for clip in clips}) > 3


def test_clips_hold_the_frames_that_their_keys_name(folder):
    source = Footage(folder, resolution=32, max_fps=10, clips=20)
    for index in range(20):
        clip = source[index]
        start = float(clip.key.split("@")[1].split("s+")[0])
        times = start + np.arange(len(clip.video)) / clip.video.fps
        for time, frame in zip(times, clip.video.frames, strict=True):
            assert abs(second(frame) - int(time + 1e-3)) <= 1
        flicker = clip.video.frames[:, :, :8].astype(float).mean((1, 2, 3)) - times
        if clip.key.startswith("deeper/b"):
            assert np.ptp(flicker) < 10
        else:
            assert (np.abs(np.diff(flicker)) > 40).all()


def test_splits_share_no_frame(folder):
    every = {"min_seconds": 0.5, "max_seconds": 6, "resolution": 32, "clips": 60}
    for split, allowed in (("train", lambda s: not 40 <= s < 50), ("validation", lambda s: 40 <= s < 50)):
        source = Footage(folder, split=split, **every)
        for index in range(60):
            clip = source[index]
            name, rest = clip.key.split("@")
            start, count = (float(part) for part in rest.split("s+"))
            seconds = start + np.arange(int(count)) / clip.video.fps
            if name == "a.mp4":
                assert all(allowed(s + 1e-6) for s in seconds), clip.key
                assert all(allowed(second(frame)) for frame in clip.video.frames)
            else:
                assert split == "train"


def test_every_tenth_block_is_held_out(tmp_path):
    counting(250, 1, 16, 16).save(tmp_path / "slow.mp4")
    held_out = {*range(40, 50), *range(140, 150), *range(240, 250)}
    for split, allowed in (("train", set(range(250)) - held_out), ("validation", held_out)):
        source = Footage(str(tmp_path), split=split, share_of_images=1, resolution=16, clips=150)
        seen = {round(float(source[i].key.split("@")[1].split("s+")[0])) for i in range(150)}
        assert seen <= allowed and len(seen) > 0.35 * len(allowed)


def test_the_same_index_is_the_same_clip_everywhere(folder):
    source = Footage(folder, resolution=(24, 32, 40), clips=50, crop=(5, 24, 24))
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    keys = set()
    for index in (7, 3, 49, 7):
        one, other = source[index], again[index]
        assert one.key == other.key and (one.video.frames == other.video.frames).all()
        keys.add(one.key)
    assert len(keys) == 3
    assert Footage(folder, resolution=32, seed=1)[7].key != Footage(folder, resolution=32)[7].key
    for index in (-1, 50):
        with pytest.raises(IndexError):
            source[index]


def test_share_of_images(folder):
    source = Footage(folder, resolution=32, clips=100, share_of_images=0.5)
    images = sum(len(source[index].video) == 1 for index in range(100))
    assert 35 <= images <= 65


def test_crops_are_windows_at_random_places_and_scales(tmp_path):
    y, x = np.mgrid[:64, :96]
    ramp = np.stack([x * 2, y * 2, 0 * x], -1).astype(np.uint8)
    Video(np.repeat(ramp[None], 16, 0), 8).save(tmp_path / "ramp.mp4", crf=0)
    source = Footage(str(tmp_path), crop=(5, 32, 32), resolution=(32, 45, 64), clips=60)
    places, scales = [], []
    for index in range(60):
        video = source[index].video
        assert video.frames.shape == (5, 32, 32, 3)
        frame = video.frames[0].astype(float)
        across, down = (frame[16, 28, 0] - frame[16, 3, 0]) / 50, (frame[28, 16, 1] - frame[3, 16, 1]) / 50
        assert across == pytest.approx(down, abs=0.15), "stretched"
        scales.append(across)
        places.append((frame[16, 16, 0] / 2, frame[16, 16, 1] / 2))
    assert min(scales) < 1.15 and max(scales) > 1.75 and max(scales) < 2.15
    spread = np.ptp(np.array(places), axis=0)
    assert spread[0] > 40 and spread[1] > 15
    # A frame too small for the window is enlarged until it holds it, not stretched.
    frame = Footage(str(tmp_path), crop=(5, 64, 48), resolution=(16, 20))[0].video.frames[0].astype(int)
    assert frame[32, 40, 0] - frame[32, 8, 0] == pytest.approx(64, abs=4)
    assert frame[48, 24, 1] - frame[16, 24, 1] == pytest.approx(64, abs=4)


@pytest.mark.parametrize(
    "fields",
    [{}, {"crop": (5, 24, 24)}, {"crop": (5, 24, 40), "resolution": (24, 30)}, {"rates": (3.0, 5.0)}],
)
def test_a_cache_gives_the_same_clips(folder, tmp_path, fields):
    fields = {"resolution": 24, "clips": 12, "max_fps": 10} | fields
    cached = Footage(folder, cache=str(tmp_path), **fields)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 3
    for plain, fast in zip(
        map(Footage(folder, **fields).__getitem__, range(12)), map(cached.__getitem__, range(12))
    ):
        assert plain.key == fast.key and plain.video.frames.shape == fast.video.frames.shape
        assert np.abs(plain.video.frames.astype(int) - fast.video.frames).mean() < 4
    Footage(folder, cache=str(tmp_path), **fields)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


def test_what_can_not_be_used_is_refused_in_words(folder, tmp_path):
    with pytest.raises(UserError, match="no folder or file"):
        Footage(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="holds no video"):
        Footage(str(tmp_path))
    whole = counting(2, 10, 32, 32).save(tmp_path / "short.mp4")
    with pytest.raises(UserError, match="a clip takes 3 seconds .* the longest video has 2 seconds"):
        Footage(str(whole), min_seconds=3)
    with pytest.raises(UserError, match=r"takes 41 frames at 24 a second \(config.loss.crop\)"):
        Footage(str(whole), crop=(41, 32, 32))
    with pytest.raises(EmptySplit, match="too little .* for validation"):
        Footage(str(whole), split="validation")
    for fields in (
        {"split": "test"},
        {"min_seconds": 5, "max_seconds": 4},
        {"max_fps": 0},
        {"rates": (8, 0)},
        {"durations": (-1.0,)},
        {"max_frames": -1},
        {"share_of_images": 2},
        {"clips": 0},
        {"resolution": 4},
        {"resolution": (64, 4)},
        {"crop": (16, 32, 32)},
        {"crop": (17, 32)},
        {"aspects": ()},
        {"damaged": "ignore"},
    ):
        with pytest.raises(UserError, match=next(iter(fields))):
            Footage(folder, **fields)
    with pytest.raises(UserError, match="16x9"):
        Footage(folder, aspects=("16x9",))


def clips_of(source: Footage) -> list:
    return [source[index] for index in range(len(source))]


def test_a_clip_draws_one_of_the_resolutions_and_of_the_durations(folder):
    fields = {"resolution": (16, 32), "durations": (0.0, 0.9, 2.0), "max_fps": 10, "multiple": 8}
    clips = clips_of(Footage(folder, clips=80, **fields))
    assert {min(clip.video.size) for clip in clips} == {16, 32}
    # Counted as toyworld counts: 1 + 4 round(seconds * fps / 4).
    assert {(clip.video.fps, len(clip.video)) for clip in clips} >= {(8, 1), (8, 9), (8, 17), (10, 21)}
    assert {len(clip.video) for clip in clips if clip.video.fps == 8} == {1, 9, 17}
    assert 15 <= sum(len(clip.video) == 1 for clip in clips) <= 40
    ended = clips_of(Footage(folder, clips=40, **fields, max_frames=12))
    assert max(len(clip.video) for clip in ended) == 9


def test_a_clip_has_what_is_on_show_at_the_rate_that_it_draws(tmp_path):
    Video(np.arange(0, 240, 4, np.uint8)[:, None, None, None] + np.zeros((60, 16, 16, 3), np.uint8), 30).save(
        tmp_path / "a.mp4", crf=0
    )
    clips = clips_of(
        Footage(str(tmp_path), resolution=16, durations=(1.0,), rates=(8.0, 15.0, 60.0), clips=30)
    )
    assert {clip.video.fps for clip in clips} == {8, 15, 30}
    for clip in clips:
        start = float(clip.key.split("@")[1].split("s+")[0])
        shown = np.round(clip.video.frames.mean((1, 2, 3)) / 4)
        wanted = np.floor(start * 30 + 1e-2 + np.arange(len(clip.video)) * 30 / clip.video.fps)
        assert np.abs(shown - wanted).max() <= 1, clip.key


@pytest.mark.parametrize(
    "fps, most, wanted", [(30.01, 30, 30.01), (24, 23.976, 24), (30, 24, 15), (60, 30, 30)]
)
def test_rates_that_are_nearly_the_same_are_the_same(tmp_path, fps, most, wanted):
    write(tmp_path / "a.mp4", pictures(60, 32, 32), fps=fractions.Fraction(fps).limit_denominator(1001))
    assert Footage(str(tmp_path), resolution=16, max_fps=most)[0].video.fps == pytest.approx(wanted, rel=1e-3)
    ratio = rate_ratio(fps, most)
    assert ratio == (1 if wanted == fps else fps / most)


@pytest.mark.parametrize("native, rate, wanted", [(23.976, 8, 3), (30, 8, 3.75), (8, 24, 1), (29.97, 15, 2)])
def test_a_rate_takes_whole_steps_where_it_nearly_can(native, rate, wanted):
    assert rate_ratio(native, rate) == wanted


@pytest.mark.parametrize(
    "aspects, size, middle",
    [
        (("native",), (32, 64), False),
        (("1:1",), (32, 32), True),
        (("1:1", "2:1"), (32, 64), False),  # the nearest to the file's own
        (("9:16", "4:3"), (32, 40), True),
        (("9:16",), (56, 32), True),
    ],
)
def test_a_clip_is_cropped_to_the_nearest_aspect(tmp_path, aspects, size, middle):
    x = np.broadcast_to(np.linspace(0, 250, 128, dtype=np.uint8)[None, None, :, None], (8, 64, 128, 3))
    Video(x, 8).save(tmp_path / "a.mp4", crf=0)
    frame = Footage(str(tmp_path), resolution=32, aspects=aspects, min_seconds=0.5)[0].video.frames[0]
    assert frame.shape[:2] == size
    left, right = frame[0, 0, 0] / 250, frame[0, -1, 0] / 250
    assert left + right == pytest.approx(1, abs=0.06), "not the middle"
    assert (left > 0.1) == middle


def test_pixels_that_are_not_square_come_out_as_displayed(tmp_path):
    write(tmp_path / "a.mp4", pictures(16, 48, 64), fps=8, sar=fractions.Fraction(3, 2))
    assert Footage(str(tmp_path), resolution=48, multiple=16)[0].video.size == (48, 96)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_a_few_short_files_the_last_is_held_out(tmp_path, count):
    for number in range(count):
        counting(2, 8, 16, 16).save(tmp_path / f"{number}.mp4")
    counting(0.5, 8, 16, 16).save(tmp_path / "z.mp4")  # too short to be held out, and for a clip
    seen = {}
    held_out = f"held out for validation: {count - 1}.mp4."
    for split in ("train", "validation"):
        source = Footage(str(tmp_path), split=split, resolution=16, clips=20)
        assert (held_out in str(source.summary())) == (split == "train")
        seen[split] = {clip.key.split("@")[0] for clip in clips_of(source)}
        note = "1 video shorter than the shortest clip that is drawn, z.mp4"
        assert (note in str(source.summary())) == (split == "train")
    assert seen == {
        "train": {f"{number}.mp4" for number in range(count - 1)},
        "validation": {f"{count - 1}.mp4"},
    }


def test_a_file_of_more_than_a_block_gives_its_last_one(tmp_path):
    counting(31, 2, 16, 16).save(tmp_path / "a.mp4")
    places = {}
    for split in ("train", "validation"):
        source = Footage(str(tmp_path), split=split, resolution=16, share_of_images=1, clips=60)
        places[split] = [float(clip.key.split("@")[1].split("s+")[0]) for clip in clips_of(source)]
    assert max(places["train"]) < 20 <= min(places["validation"])
    summary = str(Footage(str(tmp_path), resolution=16).summary())
    assert "held out for validation: a.mp4 (20 to 31 seconds)." in summary
    counting(4, 2, 16, 16).save(tmp_path / "a.mp4")
    summary = str(Footage(str(tmp_path), resolution=16).summary())
    assert "held out for validation: nothing, as there is too little." in summary


def test_pictures_are_clips_of_one_frame(tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 20), (80 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "0.txt").write_text("black")
    source = Footage(str(tmp_path), resolution=16, clips=20)
    assert {clip.video.frames.shape for clip in clips_of(source)} == {(1, 16, 32, 3)}
    assert {clip.key for clip in clips_of(source)} == {"0.jpg@0.000s+1", "1.jpg@0.000s+1"}
    counting(4, 8, 16, 16).save(tmp_path / "film.mp4")
    clips = clips_of(Footage(str(tmp_path), resolution=16, durations=(0.0, 1.0), clips=40))
    assert {clip.key.split("@")[0] for clip in clips if len(clip.video) > 1} == {"film.mp4"}
    assert {"0.jpg", "film.mp4"} <= {clip.key.split("@")[0] for clip in clips if len(clip.video) == 1}
    moving = Footage(str(tmp_path), resolution=16, durations=(1.0,), clips=10)
    assert {clip.key.split("@")[0] for clip in clips_of(moving)} == {"film.mp4"}
    assert "pictures are left out: config.data.durations has no 0" in str(moving.summary())


def test_the_number_of_clips_follows_from_the_footage(tmp_path):
    for name in "abc":
        counting(3, 8, 16, 16).save(tmp_path / f"{name}.mp4")
    fields = {"resolution": 16, "rates": (8.0,)}
    assert Footage(str(tmp_path), durations=(1.0,), **fields).natural_clips == 8 * 6
    assert Footage(str(tmp_path), durations=(0.0, 1.0), **fields).natural_clips == 2 * 8 * 6
    assert Footage(str(tmp_path), durations=(2.0,), max_frames=4, **fields).natural_clips == 2 * 8 * 6
    assert Footage(str(tmp_path), durations=(1.0,), clips=5, **fields).natural_clips == 5
    for number in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    stills = Footage(str(tmp_path), durations=(0.0, 1.0), **fields)
    assert stills.natural_clips > 2 * 8 * 6


def broken_middle(path: pathlib.Path, first: float, last: float) -> None:
    """Overwrites a part of an mp4's pictures, given as shares of the file; its index stays whole."""
    data = bytearray(path.read_bytes())
    start, stop = int(first * len(data)), int(last * len(data))
    data[start:stop] = bytes(255 * (i % 2) for i in range(stop - start))
    path.write_bytes(data)


@pytest.fixture
def damaged(tmp_path) -> pathlib.Path:
    """Two good files of six seconds, and one whose middle can't be decoded; every eighth frame is a keyframe."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.mp4", list(noise), fps=8)
    broken_middle(tmp_path / "b.mp4", 0.3, 0.6)
    return tmp_path


def test_a_clip_that_can_not_be_read_is_replaced_the_same_way_each_time(damaged, capsys):
    source = Footage(str(damaged), resolution=32, clips=60, max_seconds=2)
    assert source.summary().skipped == {} and source.summary().videos == 3, (
        "the file opens, and ends as it should"
    )
    keys = [clip.key for clip in clips_of(source)]
    assert capsys.readouterr().err.count("b.mp4 can't be read: near") == 1
    summary = source.summary()
    assert list(summary.damaged) == [str(damaged / "b.mp4")] and 2 <= summary.replaced < 40
    assert summary.metrics() == {"data/skipped_files": 1, "data/replaced_clips": summary.replaced}
    assert "b.mp4 (near" in str(summary) and ".." not in str(summary) and ".)" not in str(summary)
    again = Footage(str(damaged), resolution=32, clips=60, max_seconds=2)
    assert (
        keys == [again[index].key for index in range(60)] == [again[i].key for i in reversed(range(60))][::-1]
    )
    whole = [key for key in keys if key.startswith("b.mp4")]
    assert whole, "what is readable of it is used"
    assert pickle.loads(pickle.dumps(source)).summary() == summary


def test_a_file_that_proves_damaged_ends_a_run_that_refuses_it(damaged):
    source = Footage(str(damaged), resolution=32, clips=60, max_seconds=2, damaged="refuse")
    with pytest.raises(
        UserError, match=r"b.mp4 can't be read near .* seconds: .*; fix or remove it, or set .*'skip'"
    ):
        clips_of(source)


def test_files_that_vanish_are_replaced_until_none_is_left(damaged):
    source = Footage(str(damaged), resolution=32, clips=10)
    (damaged / "a.mp4").unlink()
    (damaged / "b.mp4").unlink()
    with pytest.raises(UserError, match="20 clips of .* in a row could not be read"):
        clips_of(source)


def test_a_cache_leaves_a_damaged_file_out(damaged, tmp_path):
    source = Footage(str(damaged), resolution=32, clips=20, cache=str(tmp_path / "cache"))
    assert {clip.key.split("@")[0] for clip in clips_of(source)} == {"a.mp4"}
    assert source.summary().metrics() == {"data/skipped_files": 1, "data/replaced_clips": 0}
    with pytest.raises(UserError, match="b.mp4"):
        Footage(str(damaged), resolution=32, cache=str(tmp_path / "other"), damaged="refuse")


@pytest.mark.skipif(not BUNNY.exists(), reason="the film is not here")
def test_a_film(tmp_path):
    train, validation = (
        Footage(str(BUNNY), split=split, crop=(17, 128, 128)) for split in ("train", "validation")
    )
    for source in (train, validation):
        video = source[5].video
        assert video.frames.shape == (17, 128, 128, 3) and video.fps == 24
        assert video.frames.std() > 5
    clip = Footage(str(BUNNY), max_seconds=1.5)[0]
    assert clip.video.size == (128, 224)
