"""Video files go out and come back whole: size, rate, colour, times; and broken ones are refused in words."""

import fractions
import itertools
import math

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.errors import UserError
from sora_jax.media import video as V


def gradients(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth picture whose brightness tells the frame's number: blue is 10 a frame."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 10 * t)], -1) for t in range(frames)]
    ).astype(np.uint8)


def write(path, times_ms, codec="libx264", pix_fmt="yuv420p", **options):
    """A video of 48x64 whose i-th frame has the brightness 10 * i and comes at times_ms[i]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 25, options={"g": "10", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for number, milliseconds in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8), "rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = milliseconds, fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames) -> list[int]:
    return [round(float(np.mean(frame)) / 10) for frame in frames]


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (64, 97), (1, 1)])
def test_mp4_comes_back_with_its_size_rate_and_colours(tmp_path, size):
    video = V.Video(gradients(5, *size), 24)
    back = V.read_video(video.save(tmp_path / "a.mp4"))
    assert back.frames.shape == video.frames.shape and back.fps == 24
    error = back.frames.astype(int) - video.frames
    assert np.abs(error).mean() < 2 and np.abs(error.mean((0, 1, 2))).max() < 1.5


@pytest.mark.skipif(
    not hasattr(av.VideoFrame, "chroma_location"),
    reason="PyAV before 19 (Python 3.11) can't say where colour samples lie: half a pixel off",
)
def test_colours_are_not_shifted_on_the_way(tmp_path):
    video = V.Video(gradients(5, 64, 96), 24)
    error = V.read_video(video.save(tmp_path / "a.mp4", crf=0)).frames.astype(int) - video.frames
    assert np.abs(error.mean((0, 1, 2))).max() < 0.4


@pytest.mark.parametrize("colour", [(200, 30, 90), (0, 255, 0), (17, 17, 17)])
def test_mp4_keeps_colours_and_says_which_they_are(tmp_path, colour):
    video = V.Video(np.full((3, 64, 96, 3), colour, np.uint8), 24)
    back = V.read_video(video.save(tmp_path / "a.mp4"))
    assert np.abs(back.frames.astype(int) - colour).max() <= 2
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


@pytest.mark.parametrize("fps", [24000 / 1001, 30000 / 1001, 30, 7.5, 1, 60, 12.5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_mp4_keeps_rate_and_number_of_frames(tmp_path, fps, count):
    back = V.read_video(V.Video(gradients(count, 16, 16), fps).save(tmp_path / "a.mp4"))
    assert len(back) == count and back.fps == pytest.approx(fps, rel=1e-6)
    assert back.duration == pytest.approx(count / fps)


def test_frames_are_written_as_they_come(tmp_path):
    """From any iterator, and to the same file."""
    video = V.Video(np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8), 24000 / 1001)
    held = 0

    def frames():
        nonlocal held
        for frame in video.frames:
            held += 1
            yield frame.copy()

    path = V.write_frames(tmp_path / "pieces.mp4", frames(), video.fps)
    assert held == 40
    assert path.read_bytes() == video.save(tmp_path / "whole.mp4").read_bytes()
    with pytest.raises(UserError, match="only as .mp4, .webm"):
        V.write_frames(tmp_path / "pieces.gif", frames(), 8.0)
    with pytest.raises(UserError, match="no frame to write"):
        V.write_frames(tmp_path / "none.mp4", iter(()), 8.0)
    assert not (tmp_path / "none.mp4").exists()


@pytest.mark.parametrize("fps", [24, 10, 120])
def test_gif_keeps_time_and_loops(tmp_path, fps):
    video = V.Video(gradients(24, 20, 31), fps)
    back = V.read_video(video.save(tmp_path / "a.gif"))
    assert back.size == (20, 31) and back.duration == pytest.approx(video.duration, abs=0.011)
    assert len(back) == (24 if fps <= 50 else 10)
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0


def test_png_is_the_frame_or_a_strip(tmp_path):
    one = V.Video(gradients(1, 20, 31), 24)
    assert (V.read_video(one.save(tmp_path / "one.png")).frames == one.frames).all()
    strip = V.read_video(V.Video(gradients(20, 20, 31), 24).save(tmp_path / "strip.png"))
    assert strip.frames.shape == (1, 20, 8 * 31, 3)


def test_other_suffixes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4, \.webm, \.gif, \.png, \.jpg"):
        V.Video(gradients(2, 8, 8), 24).save(tmp_path / "a.wmv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_what_is_no_video_is_refused(frames):
    with pytest.raises(UserError, match="uint8"):
        V.Video(frames, 24)


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_what_is_no_rate_is_refused(fps):
    with pytest.raises(UserError, match="rate"):
        V.Video(np.zeros((1, 4, 4, 3), np.uint8), fps)


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("ten_bits.mp4", "libx265", "yuv420p10le"),
        ("a.mkv", "ffv1", "bgr0"),
    ],
)
def test_streams_start_exactly_where_they_are_asked_to(tmp_path, name, codec, pix_fmt):
    path = write(tmp_path / name, range(0, 1000, 40), codec, pix_fmt)
    assert numbers(V.read_video(path).frames) == list(range(25))
    for first in range(25):
        got = list(itertools.islice(V.stream_frames(path, first / 25), 2))
        assert numbers(frame for _, frame in got) == list(range(first, min(first + 2, 25)))
        assert got[0][0] == pytest.approx(first / 25, abs=2e-3)
    # Between two frames the earlier one is on show.
    assert numbers(V.read_video(path, start=0.47, frames=3).frames) == [11, 12, 13]
    assert list(V.stream_frames(path, 5.0)) == []
    with pytest.raises(UserError, match="start earlier"):
        V.read_video(path, start=5.0)


def test_uneven_times_are_made_even(tmp_path):
    path = write(tmp_path / "a.mkv", [0, 100, 200, 300, 900, 1000, 1100, 1200])
    at_ten = [frame for _, frame in V.stream_frames(path, fps=10.0)]
    assert numbers(at_ten)[:12] == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6]
    video = V.read_video(path)
    assert video.duration == pytest.approx(1.3, abs=0.15)


def test_pictures_are_videos_of_one_frame(tmp_path):
    picture = gradients(1, 20, 31)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    back = V.read_video(tmp_path / "turned.jpg")
    assert back.frames.shape == (1, 31, 20, 3)
    assert np.abs(back.frames[0].astype(int) - np.rot90(picture, -1)).mean() < 6
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, 3:] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    back = V.read_video(tmp_path / "clear.png").frames[0]
    assert (back[:, :3] == 255).all() and (back[:, 3:] == (255, 0, 0)).all()
    Image.fromarray(np.full((4, 6), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert (V.read_video(tmp_path / "deep.png").frames == 128).all()
    assert [seconds for seconds, _ in V.stream_frames(tmp_path / "clear.png")] == [0.0]


def test_broken_files_are_refused_in_words(tmp_path):
    whole = V.Video(gradients(24, 64, 96), 24).save(tmp_path / "whole.mp4").read_bytes()
    cases = {"text.mp4": b"not a video", "empty.mp4": b"", "head.mp4": whole[:600], "cut.png": b"\x89PNG\r\n"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            V.read_video(tmp_path / name)
    with pytest.raises(UserError, match="no file"):
        V.read_video(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="folder"):
        V.read_video(tmp_path)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(UserError, match="only sound"):
        V.read_video(tmp_path / "sound.wav")


def test_what_is_left_of_a_cut_file_is_kept(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    whole = V.Video(noise, 24).save(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert 1 <= len(V.read_video(tmp_path / "cut.mp4")) < 24


def test_resize():
    video = V.Video(gradients(2, 40, 80), 24)
    assert V.resize(video, 10, 10).frames.shape == (2, 10, 10, 3)
    # Every pixel of the source counts: a chequerboard shrinks to grey.
    board = np.indices((40, 80)).sum(0)[None, ..., None] % 2 * np.full(3, 255)
    grey = V.resize(V.Video(board.astype(np.uint8), 24), 10, 20).frames
    assert np.abs(grey.astype(int) - 127).max() <= 2
    with pytest.raises(UserError, match="at least 1"):
        V.resize(video, 0, 10)


def test_frame_size():
    assert V.frame_size(270, "16:9") == (270, 480)
    assert V.frame_size(128, "9:16") == (228, 128)
    assert V.frame_size(64, "1:1") == (64, 64)
    assert V.frame_size(100, 1.78) == (100, 178)
    assert V.frame_size(100, "2.39:1") == (100, 240)
    for aspect in ("wide", "16:0", "0:9", "-1", "", "16:9:4", math.nan, math.inf, 0):
        with pytest.raises(UserError, match="like 16:9"):
            V.frame_size(64, aspect)
    with pytest.raises(UserError, match="like 256"):
        V.frame_size(0, "1:1")


def test_frame_count():
    assert [V.frame_count(*args) for args in ((2, 24), (0.99, 10), (0.001, 24), (1, 23.976))] == [
        48,
        10,
        1,
        24,
    ]


def test_notebooks_show_it_inline():
    assert "data:video/mp4;base64," in V.Video(gradients(3, 16, 16), 8)._repr_html_()
    assert "data:image/png;base64," in V.Video(gradients(1, 16, 16), 8)._repr_html_()


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(64, 112, (192, 336)), (16, 16, (192, 192)), (300, 200, (300, 200))]
)
def test_notebooks_magnify_small_frames(height, width, shown):
    for frames in (1, 3):
        text = V.Video(gradients(frames, height, width), 8)._repr_html_()
        assert f'width="{shown[1]}" height="{shown[0]}"' in text
