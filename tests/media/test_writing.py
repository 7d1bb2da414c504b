"""Files are written whole or not at all, in every kind, and say how they were made."""

import os
import signal
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
from helpers.film_files import numbers, pictures, write
from PIL import Image

from sora_jax.errors import UserError
from sora_jax.media.audio import keep_sound
from sora_jax.media.reader import read_media
from sora_jax.media.video import Video, VideoStream, read_video, write_frames
from sora_jax.media.writing import KINDS, STREAMED, read_metadata

MADE = {"prompt": 'ein "Käse" 青い 🎈\nand more', "seed": "3", "settings": '{"steps": 8, "σ": 0.5}'}


def clip(count=9, height=48, width=64) -> Video:
    return Video(np.stack(pictures(count, height, width)), 12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_how_it_was_made(tmp_path, kind):
    video = clip()
    path = video.save(tmp_path / f"a{kind}", metadata=MADE)
    assert read_metadata(path) == MADE
    frames = read_video(path).frames
    assert frames.shape == ((9, 48, 64, 3) if kind in (*STREAMED, ".gif") else (1, 48, 8 * 64, 3))
    stream = VideoStream(iter(video.frames), 9, (48, 64), 12.0).save(tmp_path / f"b{kind}", metadata=MADE)
    assert read_metadata(stream) == MADE and len(read_video(stream)) == len(frames)
    assert read_metadata(video.save(tmp_path / f"c{kind}")) == {}
    assert read_metadata(video.save(tmp_path / f"a{kind}", metadata={})) == {}


@pytest.mark.parametrize("kind, sound", [(".mp4", "aac"), (".webm", "libopus")])
def test_it_still_says_so_with_sound(tmp_path, kind, sound):
    codec = {".mp4": "libx264", ".webm": "libvpx"}[kind]
    source = write(tmp_path / f"source{kind}", pictures(9), fps=12, codec=codec, sound=(sound, 48000, 0.1))
    path = clip().save(tmp_path / f"a{kind}", metadata=MADE)
    assert (
        keep_sound(source, path)
        and read_metadata(path) == MADE
        and numbers(read_video(path)) == list(range(9))
    )


def test_files_of_others_say_nothing(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0holiday"
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.gif", comment=b"made with love \xe9")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "list.gif", comment=b"[1, 2]")
    write(tmp_path / "a.mkv", pictures(3))
    for name in ("a.jpg", "a.gif", "list.gif", "a.mkv"):
        assert read_metadata(tmp_path / name) == {}
    (tmp_path / "a.txt").write_bytes(b"\0\1\2" * 99)
    with pytest.raises(UserError, match="a.txt is neither"):
        read_metadata(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no file .*absent"):
        read_metadata(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="save a PNG"):
        clip(1).save(tmp_path / "long.jpg", metadata={"prompt": "a" * 70_000})
    assert not (tmp_path / "long.jpg").exists()


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1)])
@pytest.mark.parametrize("fps", [24000 / 1001, 30, 7.5])
def test_webm_keeps_size_rate_and_colours(tmp_path, size, fps):
    video = Video(np.stack(pictures(9, *size)), fps)
    back = read_video(write_frames(tmp_path / "a.webm", iter(video.frames), fps))
    assert back.frames.shape == video.frames.shape and back.fps == pytest.approx(fps, rel=1e-4)
    assert np.abs(back.frames.astype(int) - video.frames).mean() < 3
    with av.open(str(tmp_path / "a.webm")) as container:
        context = container.streams.video[0].codec_context
        assert context.name in ("vp9", "libvpx-vp9")
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


@pytest.mark.parametrize("kind", STREAMED)
def test_a_larger_crf_makes_smaller_files(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (8, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    sizes = [Video(noise, 8).save(tmp_path / f"{crf}{kind}", crf=crf).stat().st_size for crf in (0, 16, 28)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_jpeg_is_the_frame_or_a_strip(tmp_path):
    for name in ("a.jpg", "b.jpeg", "C.JPG"):
        back = read_video(clip(1).save(tmp_path / name))
        assert np.abs(back.frames.astype(int) - clip(1).frames).mean() < 2
    assert read_video(clip(20).save(tmp_path / "strip.jpg")).size == (48, 8 * 64)


def test_videos_are_shown_in_short(tmp_path):
    assert (
        repr(clip(17)) == "Video(17 frames, 64x48, 12 fps)"
        and repr(clip(1)) == "Video(1 frame, 64x48, 12 fps)"
    )
    assert (
        repr(VideoStream(iter([]), 480, (270, 480), 23.976)) == "VideoStream(480 frames, 480x270, 23.976 fps)"
    )
    read = read_media(clip(1).save(tmp_path / "a.png"))
    assert repr(read) == f"Media(Video(1 frame, 64x48, 1 fps), {str(tmp_path / 'a.png')!r}, 0 notes)"
    assert repr(read_media(clip(4))) == "Media(Video(4 frames, 64x48, 12 fps), 0 notes)"


ENDLESS = """
    import itertools, signal, sys
    import numpy as np
    from sora_jax.media.video import write_frames

    # A shell's background job ignores them, and so would this program in it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def frames():
        for number in itertools.count():
            if number == 3:
                print("writing", flush=True)
            yield np.zeros((16, 16, 3), np.uint8)

    write_frames(sys.argv[1], frames(), 8.0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_program_told_to_end_leaves_nothing_behind(tmp_path, number):
    (tmp_path / "out.mp4").write_bytes(b"what was there")
    program = [sys.executable, "-c", textwrap.dedent(ENDLESS), str(tmp_path / "out.mp4")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"writing\n"
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(number)
        try:
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"what was there"
