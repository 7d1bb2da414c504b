"""Whatever people have comes in as it should look, in bounded memory, and what was done to it is said."""

import fractions
import importlib.util
import pathlib
import struct
import tracemalloc

import av
import numpy as np
import pytest
from helpers.film_files import MATRICES, numbers, pictures, with_matrix, write
from PIL import Image

from sora_jax.errors import UserError
from sora_jax.media import reader as M
from sora_jax.media import video as V
from sora_jax.media.audio import keep_sound
from sora_jax.media.video import Video

FOOTAGE = pathlib.Path(__file__).parents[3] / "shared" / "footage" / "big_buck_bunny_000-400s_270p.mp4"


def red(frame: np.ndarray) -> str:
    """Where the red corner is."""
    reddish = (frame[..., 0] > 150) & (frame[..., 1] < 90)
    y, x = np.argwhere(reddish).mean(0) / frame.shape[:2]
    return ("upper " if y < 0.5 else "lower ") + ("left" if x < 0.5 else "right")


@pytest.mark.parametrize(
    "name, codec, pix_fmt, size",
    [
        ("a.mp4", "libx264", "yuv420p", (48, 64)),
        ("portrait.mp4", "libx264", "yuv420p", (96, 54)),
        ("odd.mp4", "libx264", "yuv444p", (63, 47)),
        ("odd.webm", "libvpx-vp9", "yuv420p", (47, 63)),
        ("old.mov", "mjpeg", "yuvj420p", (48, 64)),
        ("ten_bits.mp4", "libx265", "yuv420p10le", (48, 64)),
        ("film.mkv", "ffv1", "bgr0", (48, 64)),
        ("broadcast.ts", "mpeg2video", "yuv420p", (48, 64)),
    ],
)
def test_videos_come_in_whole(tmp_path, name, codec, pix_fmt, size):
    read = M.read_media(write(tmp_path / name, pictures(12, *size), codec=codec, pix_fmt=pix_fmt))
    assert read.video.size == read.source_size == size and read.video.fps == read.source_fps == 25
    assert numbers(read.video) == list(range(12)) and red(read.video.frames[5]) == "upper left"
    assert read.notes == () and read.path == tmp_path / name and read.source_frames in (12, None)


def test_a_part_at_another_rate_and_size(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(20, 90, 160), fps=20)
    read = M.read_media(path, fps=10, start=0.2, seconds=0.5, resolution=18)
    assert numbers(read.video) == [4, 6, 8, 10, 12] and read.video.frames.shape == (5, 18, 32, 3)
    assert (read.source_size, read.source_fps, read.source_frames) == ((90, 160), 20, 20)
    assert [note.split(" was ")[1] for note in read.notes] == [
        "resized from 160x90 to 32x18 pixels.",
        "taken from 20 to 10 frames a second.",
    ]
    assert M.read_media(path, seconds=0.1, resolution=180).video.size == (180, 320)
    # A faster rate shows each frame for longer, and lasts as long.
    assert numbers(M.read_media(path, fps=40, seconds=0.2).video) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(M.read_media(path, fps=60).video) == 60
    assert "ends after 1 seconds, before the 3 " in M.read_media(path, start=0.5, seconds=2.5).notes[0]
    with pytest.raises(UserError, match="start earlier"):
        M.read_media(path, start=1.0)


def test_television_rates_stay_exact(tmp_path):
    ntsc = fractions.Fraction(30000, 1001)
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")):
        read = M.read_media(write(tmp_path / name, pictures(25), ntsc, codec))
        assert read.source_fps == pytest.approx(float(ntsc), rel=1e-4) and numbers(read.video) == list(
            range(25)
        )
        assert read.notes == ()


def test_uneven_times_are_made_even_and_that_is_said(tmp_path):
    times = [0, 100, 200, 300, 900, 1000, 1100, 1200]
    read = M.read_media(write(tmp_path / "a.mkv", pictures(8), times_ms=times), fps=10)
    assert numbers(read.video)[:12] == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6]
    assert "uneven times" in read.notes[-1]
    # A frame that was on show long before `start` does not bring that time along.
    late = M.read_media(tmp_path / "a.mkv", fps=10, start=0.7)
    assert numbers(late.video)[:4] == [3, 3, 4, 5]


def test_pixels_become_square(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(3), sar=fractions.Fraction(3, 2))
    read = M.read_media(path)
    assert read.source_size == (48, 64) and read.video.size == (48, 96)
    assert "64x48 to 96x48 pixels, its own not being square" in read.notes[0]
    assert M.read_media(with_matrix(path, MATRICES["a quarter clockwise"])).video.size == (96, 48)


def test_trimmed_on_a_telephone(tmp_path):
    """An edit list hides frames that are still in the file: they count neither as frames nor in the rate."""
    data = bytearray(write(tmp_path / "a.mp4", pictures(24), fps=24).read_bytes())
    place = data.index(b"elst") + 12
    _, begin, _ = struct.unpack(">IiI", data[place : place + 12])
    with av.open(str(tmp_path / "a.mp4")) as container:
        tick = container.streams.video[0].time_base
    data[place : place + 12] = struct.pack(">IiI", 500, begin + round(0.25 / tick), 1 << 16)
    (tmp_path / "a.mp4").write_bytes(data)
    read = M.read_media(tmp_path / "a.mp4")
    assert read.source_fps == 24 and numbers(read.video) == list(range(6, 18)) and read.notes == ()


def test_what_is_transparent_lies_on_white(tmp_path):
    clear = pictures(4)
    frames = [np.dstack([frame, np.full(frame.shape[:2], 255, np.uint8)]) for frame in clear]
    for frame in frames:
        frame[:, 32:, 3] = 0
    images = [Image.fromarray(frame) for frame in frames]
    write(tmp_path / "a.webm", frames, codec="libvpx-vp9", pix_fmt="yuva420p")
    write(tmp_path / "a.mov", frames, codec="qtrle", pix_fmt="argb")
    images[2].save(tmp_path / "still.png")
    images[2].quantize().save(tmp_path / "palette.png")
    for name in ("a.gif", "a.png", "a.webp"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=40, lossless=True)
    for path in sorted(tmp_path.iterdir()):
        read = M.read_media(path)
        frame = read.video.frames[-1]
        assert frame[:, 40:].min() > 250 and frame[30:, :24].max() < 40, path.name
        assert "transparent in places" in read.notes[-1], path.name
    # Alpha that hides nothing is not worth a word.
    Image.fromarray(clear[0]).convert("RGBA").save(tmp_path / "whole.png")
    assert M.read_media(tmp_path / "whole.png").notes == ()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_pictures_that_move(tmp_path, name):
    images = [Image.fromarray(frame) for frame in pictures(10)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=50, lossless=True)
    read = M.read_media(tmp_path / name)
    assert numbers(read.video) == list(range(10)) and read.video.fps == 20 and read.notes == ()
    assert numbers(M.read_media(tmp_path / name, fps=10, start=0.2).video) == [4, 6, 8]


def test_pictures_are_one_frame_at_the_rate_asked_for(tmp_path):
    picture = pictures(8)[7]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(picture).save(tmp_path / "turned.webp", exif=exif, quality=95)
    for name in ("turned.jpg", "turned.webp"):
        read = M.read_media(tmp_path / name, fps=8, resolution=24)
        assert read.video.frames.shape == (1, 32, 24, 3) and read.video.fps == 8
        assert read.source_size == (64, 48) and red(read.video.frames[0]) == "upper right"
    Image.fromarray(np.full((6, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert (M.read_media(tmp_path / "deep.png").video.frames == 128).all()
    with av.open(str(tmp_path / "deep_colour.png"), "w", format="image2") as container:
        stream = container.add_stream("png", 1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb48be"
        frame = av.VideoFrame.from_ndarray(picture.astype(np.uint16) * 257, "rgb48be")
        container.mux(stream.encode(frame) + stream.encode(None))
    assert (M.read_media(tmp_path / "deep_colour.png").video.frames[0] == picture).all()
    for name in ("one.gif", "one.webp", "one.png"):
        Image.fromarray(picture).save(tmp_path / name, lossless=True)
        read = M.read_media(tmp_path / name, fps=24, start=3, seconds=2)
        assert numbers(read.video) == [7] and read.source_frames == 1 and read.notes == ()
    assert numbers(M.read_media(Image.open(tmp_path / "one.png")).video) == [7]
    assert len(M.read_media(write(tmp_path / "one.mp4", pictures(1)), fps=60).video) == 1


def test_arrays_of_every_shape():
    frames = np.stack(pictures(6))
    whole = Video(frames, 12)
    for source in (frames, frames / 255, (frames / 255).astype(np.float16)):
        read = M.read_media(source, fps=12)
        assert (read.video.frames == frames).all() and read.source_fps == 12 and read.path is None
    assert (M.read_media(whole).video.frames == frames).all() and M.read_media(whole).notes == ()
    assert (M.read_media(frames[3]).video.frames == frames[3:4]).all()
    for grey in (frames[..., 1], frames[..., 1:2], frames[2, ..., 1] / 255, frames[2, ..., 1:2]):
        read = M.read_media(grey, fps=8)
        assert read.video.frames.shape == (len(grey) if len(grey) == 6 else 1, 48, 64, 3)
        assert (read.video.frames[..., 0] == read.video.frames[..., 2]).all()
    half = np.dstack([frames[2], np.full((48, 64), 128, np.uint8)])
    read = M.read_media(half)
    assert abs(int(read.video.frames[0, 40, 40, 0]) - (20 + 255) // 2) <= 1 and "white" in read.notes[0]
    assert (M.read_media(half[None] / 255, fps=3).video.frames == read.video.frames).all()
    part = M.read_media(whole, fps=6, start=2 / 12, seconds=0.5, resolution=24)
    assert numbers(part.video) == [2, 4] and part.video.size == (24, 32)
    with pytest.raises(UserError, match="video has no frame at 0.5 seconds"):
        M.read_media(whole, start=0.5)


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((2, 4, 4, 3)) + 7, "0..1, not in 7..7"),
        (np.full((4, 4), np.nan), "0..1, not in nan"),
        (np.zeros((4, 4), np.int64), "not of int64"),
        (np.zeros((2, 4, 4, 2), np.uint8), "not [2, 4, 4, 2]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "nothing empty"),
        (np.zeros((2, 4, 4, 3), np.uint8), "say fps"),
        (7, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_video_is_refused(source, message):
    with pytest.raises(UserError) as error:
        M.read_media(source)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "argument", [{"fps": 0}, {"fps": np.nan}, {"start": -1}, {"seconds": 0}, {"resolution": 0}]
)
def test_what_makes_no_sense_is_refused(argument):
    with pytest.raises(UserError, match=next(iter(argument))):
        M.read_media(np.zeros((4, 4), np.uint8), **argument)


def test_broken_files_are_refused_in_words(tmp_path):
    whole = write(tmp_path / "whole.mp4", pictures(24)).read_bytes()
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    png = (tmp_path / "whole.png").read_bytes()
    text = b"Once upon a time\n" * 99
    cases = {
        "text.mp4": (text, "another kind"),
        "text.txt": (text, "a text"),
        "text.png": (text, "no video"),
        "empty.mp4": (b"", "is empty"),
        "empty.png": (b"", "is empty"),
        "no_index.mp4": (whole[: len(whole) // 2], "cut off"),
        "head.png": (png[:30], "head.png"),
        "half.png": (png[: len(png) // 2], "is the file whole"),
        "photo.heic": (whole.replace(b"ftypisom", b"ftypheic", 1), "HEIC"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            M.read_media(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(UserError, match="no file"):
        M.read_media(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="folder"):
        M.read_media(str(tmp_path))
    for name in ("nothing.mkv", "nothing.avi", "nothing.nut"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", 25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        with pytest.raises(UserError, match=name):
            M.read_media(tmp_path / name)
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", 48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame) + stream.encode(None))
    with pytest.raises(UserError, match="only sound"):
        M.read_media(tmp_path / "sound.m4a")
    # A bomb: a file of some kilobytes whose picture would fill the memory.
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="too many pixels"):
        M.read_media(tmp_path / "bomb.png")


def noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3)).astype(np.uint8))


def test_broken_in_the_middle(tmp_path):
    data = bytearray(write(tmp_path / "a.mp4", noise(60), fps=30).read_bytes())
    # Nothing behind the place is lost: its own keyframes bring it back.
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    (tmp_path / "a.mp4").write_bytes(data)
    read = M.read_media(tmp_path / "a.mp4")
    assert len(read.video) == 60 and len(read.notes) == 1
    assert "is damaged: " in read.notes[0]
    assert 1 <= int(read.notes[0].split("damaged: ")[1].split()[0]) <= 15
    # What was not asked for is not complained about.
    assert M.read_media(tmp_path / "a.mp4", seconds=0.5).notes == ()


@pytest.mark.parametrize("name, codec", [("a.webm", "libvpx-vp9"), ("a.mkv", "libx264")])
def test_cut_off(tmp_path, name, codec):
    path = write(tmp_path / name, noise(60), fps=30, codec=codec)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    read = M.read_media(path)
    assert 20 < len(read.video) < 40
    assert "lasts 2 seconds by its header, but its pictures end after" in read.notes[-1]
    assert M.read_media(path, seconds=0.5).notes == ()


def test_a_gif_is_used_as_far_as_it_goes(tmp_path):
    images = [Image.fromarray(frame) for frame in pictures(10)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=50)
    data = (tmp_path / "a.gif").read_bytes()
    for size in range(len(data) // 2, len(data) // 2 + 40):
        (tmp_path / "a.gif").write_bytes(data[:size])
        got = numbers(M.read_media(tmp_path / "a.gif", fps=20).video)
        assert got[0] == 0 and max(got) >= 3 and got == sorted(got)


def test_a_codec_that_nobody_knows(tmp_path):
    write(tmp_path / "a.mkv", pictures(3), codec="ffv1", pix_fmt="bgr0", sound=("flac", 48000, 0.0))
    data = (tmp_path / "a.mkv").read_bytes()
    video = write(tmp_path / "b.mp4", pictures(3))
    (tmp_path / "a.mkv").write_bytes(data.replace(b"A_FLAC", b"A_FLOP"))
    assert numbers(M.read_media(tmp_path / "a.mkv").video) == [0, 1, 2] and not keep_sound(
        tmp_path / "a.mkv", video
    )
    (tmp_path / "a.mkv").write_bytes(data.replace(b"V_FFV1", b"V_FFV7"))
    with pytest.raises(UserError, match="coded in a way"):
        M.read_media(tmp_path / "a.mkv")


def test_too_long_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", pictures(200, 16, 16))
    taken = 0

    def counted(*args):
        nonlocal taken
        for moment in decoded(*args):
            taken += 1
            yield moment

    decoded = V.decoded
    monkeypatch.setattr(V, "decoded", counted)
    with pytest.raises(UserError) as error:
        M.read_media(path, most_frames=50)
    message = str(error.value)
    assert all(
        word in message for word in ("a.mp4 lasts 8 seconds, 200 frames", "50 of 16x16", "--start", "--end")
    )
    assert taken <= 2
    # What is asked for is counted, not what is there.
    assert len(M.read_media(path, most_frames=50, seconds=2).video) == 50
    assert len(M.read_media(path, most_frames=50, start=6).video) == 50
    assert len(M.read_media(path, most_frames=50, fps=6.25).video) == 50
    # A large picture has fewer frames.
    monkeypatch.setattr(M, "MAX_BYTES", 30 * 16 * 16 * 3)
    with pytest.raises(UserError, match="30 of 16x16 pixels are the most"):
        M.read_media(path)


def test_too_long_without_a_header_stops_at_the_limit(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", pictures(2, 16, 16))
    taken = 0

    def endless(*_):
        nonlocal taken
        while True:
            yield taken / 25, (taken + 1) / 25, np.zeros((300, 400, 3), np.uint8)
            taken += 1

    monkeypatch.setattr(V, "decoded", endless)
    monkeypatch.setattr(V, "header", lambda _: V.Header(25, np.nan, (16, 16), None))
    tracemalloc.start()
    with pytest.raises(UserError, match="has more than 100 frames to read"):
        M.read_media(tmp_path / "a.mp4", most_frames=100, resolution=30)
    assert taken <= 103 and tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_memory_is_the_results(tmp_path):
    path = write(tmp_path / "large.mp4", [np.zeros((2160, 3840, 3), np.uint8)] * 4, codec="mpeg4")
    tracemalloc.start()
    assert M.read_media(path, resolution=36).video.frames.shape == (4, 36, 64, 3)
    # One frame being made smaller, never all of them.
    assert tracemalloc.get_traced_memory()[1] < 2.5 * 2160 * 3840 * 3
    tracemalloc.stop()


def test_files_of_other_people():
    """Those that matplotlib brings: photographs, icons with alpha, palettes."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None:
        pytest.skip("matplotlib is not here")
    files = [
        file
        for file in (pathlib.Path(spec.origin).parent / "mpl-data").rglob("*")
        if file.suffix in (".png", ".jpg", ".gif")
    ]
    assert len(files) > 5
    for file in files:
        read = M.read_media(file, resolution=16)
        assert len(read.video) == 1 and min(read.video.size) == 16, file.name


@pytest.mark.skipif(not FOOTAGE.exists(), reason="the footage lies beside the project")
def test_real_footage():
    read = M.read_media(FOOTAGE, fps=8, start=100, seconds=2, resolution=64)
    assert read.video.frames.shape == (16, 64, 114, 3) and read.source_fps == 24
    assert read.video.frames.std() > 10 and not read.notes[2:]
    with pytest.raises(UserError, match="lasts 400 seconds"):
        M.read_media(FOOTAGE)
