"""One reader of video files: abilities, training and evaluation see the same frames, as players show them."""

import fractions
import itertools
import os
import pathlib

import av
import numpy as np
import pytest
from helpers.film_files import MATRICES, numbers, pictures, shown_by, with_matrix, write
from PIL import Image

from sora_jax.data.footage import Footage
from sora_jax.data.survey import survey
from sora_jax.errors import UserError
from sora_jax.media import decoding
from sora_jax.media import video as V
from sora_jax.media.audio import keep_sound
from sora_jax.media.reader import read_media


def clip_of(path) -> np.ndarray:
    """The first frames of a training clip that shows its file whole."""
    size = V.probe(path).size
    data = Footage(str(path), resolution=min(size), min_seconds=0.2, max_seconds=0.2, multiple=1, clips=1)
    return data[0].video.frames


READERS = {
    "read_media": lambda path: read_media(path).video.frames,
    "read_video": lambda path: V.read_video(path).frames,
    "stream_frames": lambda path: np.stack([frame for _, frame in V.stream_frames(path)]),
    "Footage": clip_of,
}
readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def corners(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose four quarters differ."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2], frame[: height // 2, width // 2 :] = (240, 20, 20), (20, 240, 20)
    frame[height // 2 :, : width // 2] = (20, 20, 240)
    return frame


@readers
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_every_display_matrix_in_every_reader(tmp_path, read, matrix):
    path = write(tmp_path / "a.mp4", [corners()] * 6, pix_fmt="yuv444p")
    wanted = shown_by(matrix, corners())
    with_matrix(path, matrix)
    assert V.probe(path).size == wanted.shape[:2]
    for frame in read(path)[:2]:
        assert frame.shape == wanted.shape and np.abs(frame.astype(int) - wanted).mean() < 5


@readers
@pytest.mark.parametrize(
    "ratio, size", [("3/2", (48, 96)), ("2/3", (72, 64)), ("8/9", (54, 64)), ("1/1", (48, 64))]
)
@pytest.mark.parametrize("matrix", ["as stored", "a quarter clockwise"])
def test_pixels_are_square_in_every_reader(tmp_path, read, ratio, size, matrix):
    path = write(tmp_path / "a.mp4", [corners()] * 6, sar=fractions.Fraction(ratio))
    with_matrix(path, MATRICES[matrix])
    wanted = size if matrix == "as stored" else size[::-1]
    assert V.probe(path).size == wanted and read(path).shape[1:3] == wanted


def grey_file(path, size, codec="libx264", colour=(90, 100, 190), **tags):
    """A file of one YUV colour that says of its colours what `tags` say, and nothing else."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 10, {"qp": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(5):
            frame = av.VideoFrame(size[1], size[0], "yuv420p")
            for plane, value in zip(frame.planes, colour):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@readers
@pytest.mark.parametrize(
    "size, matrix, kr, kb",
    [
        ((480, 640), 2, 0.299, 0.114),
        ((718, 64), 2, 0.299, 0.114),
        ((720, 64), 2, 0.2126, 0.0722),
        ((1080, 64), 2, 0.2126, 0.0722),
        ((534, 1280), 2, 0.2126, 0.0722),
        ((534, 1278), 2, 0.299, 0.114),
        ((534, 1280), 5, 0.299, 0.114),
        ((48, 64), 1, 0.2126, 0.0722),
        ((720, 64), 5, 0.299, 0.114),
        ((48, 64), 9, 0.2627, 0.0593),
    ],
)
def test_colours_are_as_players_show_them(tmp_path, read, size, matrix, kr, kb):
    """Tags are obeyed; without one, 720 lines or 1280 columns and more are BT.709, fewer BT.601."""
    path = grey_file(tmp_path / "a.mp4", size, colorspace=matrix)
    y, u, v = (90 - 16) / 219, (100 - 128) / 224, (190 - 128) / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    wanted = np.clip(np.array([red, green, blue]) * 255, 0, 255)
    assert np.abs(read(path)[0, 20, 20] - wanted).max() < 2.5


@readers
@pytest.mark.parametrize("matrix", [8, 10, 11, 12, 13, 14])
def test_rare_matrices_are_refused_in_words(tmp_path, read, matrix):
    path = grey_file(tmp_path / "rare.mp4", (48, 64), colorspace=matrix)
    try:
        assert read(path).shape[1:] == (48, 64, 3)  # a later FFmpeg may convert it
    except UserError as error:
        assert all(part in str(error) for part in ("rare.mp4", "has colours of a kind", "BT.709"))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_short_transport_streams_are_read(tmp_path, codec, count):
    """FFmpeg doesn't take so few packets for a stream."""
    path = write(tmp_path / "a.ts", [corners()] * count, codec=codec)
    assert len(V.read_video(path)) == count
    (tmp_path / "b.ts").write_text("G is how this script begins")
    with pytest.raises(UserError, match=r"b\.ts can't be read"):
        V.read_video(tmp_path / "b.ts")


@pytest.mark.skipif(
    not hasattr(av.CodecContext, "coded_side_data"), reason="this PyAV has the matrix with frames alone"
)
def test_side_data_of_frames_is_never_listed(tmp_path, monkeypatch):
    class Frame:
        def __init__(self, frame):
            self._frame = frame

        def __getattr__(self, name):
            assert name != "side_data"
            return getattr(self._frame, name)

    readable = decoding._readable
    monkeypatch.setattr(decoding, "_readable", lambda *args: map(Frame, readable(*args)))
    for path in (write(tmp_path / "a.mp4", [corners()] * 6), write(tmp_path / "a.mov", [corners()] * 6)):
        assert np.abs(read_media(path).video.frames[0, 5, 5].astype(int) - (240, 20, 20)).max() < 9


def test_the_picture_for_what_shows_none_that_move_is_left_out(tmp_path):
    images = [Image.fromarray(frame) for frame in pictures(6)]
    images[5].save(
        tmp_path / "a.png", save_all=True, append_images=images[:5], duration=100, default_image=True
    )
    video = read_media(tmp_path / "a.png").video
    assert numbers(video) == list(range(5)) and video.fps == pytest.approx(10)
    assert V.probe(tmp_path / "a.png").frames == 5


def test_hdr_is_said(tmp_path):
    for trc in (16, 18):
        path = grey_file(tmp_path / f"{trc}.mp4", (48, 64), colorspace=9, color_trc=trc, color_primaries=9)
        report = V.Report()
        list(V.stream_frames(path, report=report))
        assert V.probe(path).high_range and report.high_range and "HDR colours" in read_media(path).notes[-1]


@pytest.mark.parametrize(
    "primaries, transfer, words",
    [
        (12, 13, "wide-gamut"),
        (9, 14, "wide-gamut"),
        (9, 1, "wide-gamut"),
        (1, 8, "linear"),
        (1, 1, ""),
        (1, 13, ""),
        (5, 6, ""),
        (6, 6, ""),
        (2, 2, ""),
    ],
)
def test_colours_that_are_not_converted_are_said(tmp_path, primaries, transfer, words):
    path = grey_file(
        tmp_path / "a.mp4", (48, 64), colorspace=1, color_trc=transfer, color_primaries=primaries
    )
    notes = read_media(path).notes
    assert len(notes) == bool(words) and words in "".join(notes)


def test_colours_come_back_where_they_were(tmp_path):
    """VP9 itself doesn't say where colour samples lie, so WebM does."""
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None] * 4, 48, 0)
    frame = np.stack([ramp, 0 * ramp, 255 - ramp], -1)
    for name in ("a.mp4", "a.webm"):
        path = V.Video(np.repeat(frame[None], 4, 0), 8).save(tmp_path / name, crf=0)
        sound = "aac" if name == "a.mp4" else "libopus"
        source = write(tmp_path / f"{sound}.mkv", pictures(4), fps=8, sound=(sound, 48000, 0.1))
        for heard in (False, True):
            assert not heard or keep_sound(source, path)
            back = V.read_video(path).frames[0].astype(int)
            if hasattr(av.VideoFrame, "chroma_location"):
                assert np.abs((back - frame).mean((0, 1))).max() < 0.4, (name, heard)


def test_frames_that_change_their_size_come_at_the_first_ones(tmp_path):
    parts = [
        write(tmp_path / f"{width}.ts", pictures(12, 48, width), codec="mpeg2video").read_bytes()
        for width in (64, 80)
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    report = V.Report()
    frames = [frame for _, frame in V.stream_frames(tmp_path / "a.ts", report=report)]
    assert {frame.shape for frame in frames} == {(48, 64, 3)} and report.sizes == {(48, 64), (48, 80)}
    assert "changes its size midway" in " ".join(read_media(tmp_path / "a.ts").notes)


class Pipe:
    """A file that can't go back to write how long it became."""

    def __init__(self, path: pathlib.Path):
        self.file = open(path, "wb")  # noqa: SIM115
        self.write = self.file.write


def test_a_webm_without_a_duration_says_how_long_it_is(tmp_path):
    pipe = Pipe(tmp_path / "a.webm")
    with av.open(pipe, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", 10, {"deadline": "realtime", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for array in pictures(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, "rgb24")))
        container.mux(stream.encode(None))
    pipe.file.close()
    with av.open(str(tmp_path / "a.webm")) as container:
        assert container.duration is None
    known = V.probe(tmp_path / "a.webm")
    assert known.seconds == pytest.approx(2.0, abs=0.01) and known.fps == 10 and known.size == (48, 64)
    assert Footage(str(tmp_path / "a.webm"), resolution=48, clips=1)[0].video.fps == 10
    with pytest.raises(UserError, match="lasts 2 seconds, 20 frames"):
        read_media(tmp_path / "a.webm", most_frames=10)


@pytest.mark.parametrize(
    "name, codec, form",
    [
        ("a.mp4", "libx264", "h264"),
        ("a.ts", "libx264", "h264"),
        ("a.mov", "libx265", "hevc"),
        ("a.m2v", "mpeg2video", "mpeg2video"),
        ("a.mpg", "mpeg1video", "mpeg1video"),
        ("a.m4v", "mpeg4", "m4v"),
    ],
)
def test_streams_in_no_container(tmp_path, name, codec, form):
    """FFmpeg can't jump in them, and guesses the duration of some; Pillow takes some for pictures."""
    path = write(tmp_path / name, [frame for frame in pictures(25) for _ in range(3)], codec=codec, form=form)
    known = V.probe(path)
    assert known.seconds == pytest.approx(3) and known.fps == 25 and not known.still
    assert numbers(read_media(path).video) == [i for i in range(25) for _ in range(3)]
    assert numbers(read_media(path, start=2.4).video) == [i for i in range(20, 25) for _ in range(3)]
    (film,) = survey(str(tmp_path)).source_files
    assert film.seconds == pytest.approx(3) and (film.height, film.width, film.fps) == (48, 64, 25)
    assert clip_of(path).shape[1:] == (48, 64, 3)


def test_what_was_lost_is_reported(tmp_path):
    noise = list(np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3)).astype(np.uint8))
    path = write(tmp_path / "a.mp4", noise, fps=30)
    report = V.Report()
    assert len(list(V.stream_frames(path, report=report))) == 60
    assert report.damage() == () and not report.lost and report.end == pytest.approx(2.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    report = V.Report()
    list(V.stream_frames(path, report=report, fps=30))
    (sentence,) = report.damage()
    assert "a.mp4 is damaged: " in sentence and sentence == read_media(path).notes[0]
    assert report.damage(0.0, 0.4) == ()
    path = write(tmp_path / "a.webm", noise, fps=30, codec="libvpx-vp9")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = V.Report()
    list(V.stream_frames(path, report=report))
    assert "lasts 2 seconds by its header, but its pictures end after" in report.damage()[0]


NAMES = (
    "2026-05-01T12:30:00.mp4",
    "http:x.mp4",
    "pipe:1.mp4",
    "concat:a|b.mp4",
    "file:a.mp4",
    "-",
    "-y.mp4",
    "100%d.mp4",
    "a?b#c.mp4",
    "take 1, end.mp4",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_never_an_address(tmp_path, monkeypatch, name):
    """Input, output and sound, whether the folder is named or not."""
    monkeypatch.chdir(tmp_path)
    os.replace(write(tmp_path / "plain.mp4", pictures(6), sound=("aac", 48000, 0.1)), tmp_path / name)
    for path in (name, os.path.join(".", name), tmp_path / name):
        assert numbers(read_media(path).video) == list(range(6))
        assert len(V.read_video(path)) == 6
    output = name if name.endswith(".mp4") else "out:1.mp4"
    source = os.replace(name, "source:0.mp4") or "source:0.mp4"
    V.Video(np.stack(pictures(6)), 25).save(output, metadata={"prompt": "a"})
    assert keep_sound(source, output) and len(read_media(output).video) == 6
    assert sorted(os.listdir()) == sorted(["source:0.mp4", output])


def test_the_frame_on_show_not_the_nearest(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(25))
    # At 0.1 s frame 2 is on show until 0.12.
    tenths = [frame for _, frame in itertools.islice(V.stream_frames(path, fps=10), 6)]
    assert numbers(V.Video(np.stack(tenths), 10)) == [0, 2, 5, 7, 10, 12]
    assert numbers(read_media(path, fps=10).video)[:6] == [0, 2, 5, 7, 10, 12]


def test_why_a_file_can_not_be_read(tmp_path):
    whole = write(tmp_path / "whole.mp4", pictures(24)).read_bytes()
    V.Video(np.stack(pictures(24)), 8).save(tmp_path / "front.mp4")  # its index in front
    front = (tmp_path / "front.mp4").read_bytes()
    cases = {
        "no_index.mp4": (whole[: len(whole) // 2], "cut off before its index"),
        "zeros.mp4": (bytes(5000), "zeros alone"),
        "page.mp4": (b"\n<!DOCTYPE html><html>404", "page of a failed download"),
        "answer.webm": (b'{"error": "not found"}', "page of a failed download"),
        "pointer.mp4": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "git lfs pull",
        ),
        "other.mp4": (np.random.default_rng(1).bytes(5000), "damaged, cut off or of another kind"),
        "torn.mp4": (front.replace(b"avc1", b"\0\0\0\0"), "torn.mp4"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        for read in READERS.values():
            with pytest.raises(UserError, match=reason) as error:
                read(tmp_path / name)
            assert name in str(error.value)
