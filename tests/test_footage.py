"""Footage: clips of the right frames, shapes and words, the same every time, and never of the other split."""

import pathlib
import pickle

import numpy as np
import pytest

from sora_jax.data.footage import Footage
from sora_jax.errors import UserError
from sora_jax.video import Video

BUNNY = pathlib.Path(__file__).parents[2] / "shared/footage/big_buck_bunny_000-400s_270p.mp4"


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
    source = Footage(folder, resolution=32, clips=50, crop=(5, 24, 24), crop_short_side=(24, 36))
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
    source = Footage(str(tmp_path), crop=(5, 32, 32), crop_short_side=(32, 64), clips=60)
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
    frame = Footage(str(tmp_path), crop=(5, 64, 48), crop_short_side=(16, 20))[0].video.frames[0].astype(int)
    assert frame[32, 40, 0] - frame[32, 8, 0] == pytest.approx(64, abs=4)
    assert frame[48, 24, 1] - frame[16, 24, 1] == pytest.approx(64, abs=4)


@pytest.mark.parametrize(
    "fields", [{}, {"crop": (5, 24, 24)}, {"crop": (5, 24, 40), "crop_short_side": (24, 30)}]
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
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        Footage(str(tmp_path))
    (tmp_path / "broken.mp4").unlink()
    whole = counting(2, 10, 32, 32).save(tmp_path / "short.mp4")
    with pytest.raises(UserError, match="shorter than 3 seconds"):
        Footage(str(whole), min_seconds=3)
    with pytest.raises(UserError, match="validation"):
        Footage(str(whole), split="validation")
    (tmp_path / "short.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"short\.txt"):
        Footage(str(whole))[0]
    for fields in (
        {"split": "test"},
        {"min_seconds": 5, "max_seconds": 4},
        {"max_fps": 0},
        {"share_of_images": 2},
        {"clips": 0},
        {"resolution": 4},
        {"crop": (16, 32, 32)},
        {"crop": (17, 32)},
        {"crop_short_side": (64, 32)},
    ):
        with pytest.raises(UserError, match=next(iter(fields))):
            Footage(folder, **fields)


def test_a_file_that_breaks_off_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    whole = Video(noise, 8).save(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    source = Footage(str(tmp_path), resolution=32, min_seconds=4, max_seconds=5, clips=4)
    with pytest.raises(UserError, match=r"cut\.mp4 is damaged or cut off"):
        source[0]


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
