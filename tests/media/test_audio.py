"""A video keeps the sound of the file that it was made from, in time."""

import av
import pytest
from helpers.film_files import click, numbers, pictures, write
from PIL import Image

from sora_jax.errors import UserError
from sora_jax.media import reader as M
from sora_jax.media.audio import SOUND, keep_sound
from sora_jax.media.decoding import taken_from


@pytest.mark.parametrize(
    "name, sound, video_name",
    [
        ("a.mp4", "aac", "b.mp4"),
        ("a.webm", "libopus", "b.webm"),
        ("a.webm", "libopus", "b.mp4"),
        ("a.mp4", "libmp3lame", "b.webm"),
        ("a.mov", "pcm_s16le", "b.mp4"),
        ("a.mkv", "flac", "b.mov"),
    ],
)
def test_sound_stays_with_its_picture(tmp_path, name, sound, video_name):
    codecs = {".webm": "libvpx"}
    source = tmp_path / name
    write(source, pictures(50), codec=codecs.get(source.suffix, "libx264"), sound=(sound, 48000, 1.2))
    assert numbers(M.read_media(source).video)[:9] == list(range(9))
    video = tmp_path / video_name
    silent = write(video, pictures(40), codec=codecs.get(video.suffix, "libx264")).read_bytes()
    for start, at, begin in ((0.0, 0.0, 0.0), (0.88, 0.0, 0.88), (0.9, 0.0, 0.88), (0.51, 0.33, 0.48)):
        video.write_bytes(silent)
        assert keep_sound(source, video, start, at)
        # Between two frames both begin where the frame on show does.
        assert click(video) == pytest.approx(1.2 - begin + at, abs=0.003)
        read = M.read_media(video)
        assert len(read.video) == 40 and numbers(read.video)[:25] == list(range(25)) and read.notes == ()
        with av.open(str(video)) as container:
            assert container.duration / av.time_base == pytest.approx(1.6, abs=0.11)
            codec = container.streams.audio[0].codec_context.codec.canonical_name
    kind = sound.removeprefix("lib").replace("mp3lame", "mp3")
    kept, other = SOUND[video.suffix]
    assert codec == (kind if kind in kept else other.removeprefix("lib"))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, video_name])


def test_where_there_is_no_sound_to_keep(tmp_path):
    silent = write(tmp_path / "silent.mp4", pictures(10))
    loud = write(tmp_path / "loud.mp4", pictures(10), sound=("aac", 48000, 0.1))
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    video = write(tmp_path / "b.mp4", pictures(10))
    before = video.read_bytes()
    for source in (silent, tmp_path / "a.png"):
        assert not keep_sound(source, video)
    assert not keep_sound(loud, video, start=5) and not keep_sound(loud, video, at=5)
    assert not keep_sound(loud, tmp_path / "a.png")
    assert video.read_bytes() == before
    with pytest.raises(UserError, match="absent.mp4"):
        keep_sound(tmp_path / "absent.mp4", video)
    with pytest.raises(UserError, match="absent.mp4"):
        keep_sound(loud, tmp_path / "absent.mp4")


def test_a_start_between_two_frames(tmp_path):
    """At 8 frames a second half a frame is heard: the picture and the sound begin with the frame on show."""
    source = write(tmp_path / "a.mp4", pictures(24), fps=8, sound=("aac", 48000, 1.5))
    for start, first in ((0.24, 1), (0.99, 7), (1.0, 8)):
        read = M.read_media(source, start=start)
        assert numbers(read.video)[0] == first
        path = read.video.save(tmp_path / "b.mp4")
        assert keep_sound(source, path, start)
        # The click comes with frame 12, wherever that now is.
        assert click(path) == pytest.approx((12 - first) / 8, abs=0.003)
    # Whose picture has stood for long begins at the time asked, and so does its sound.
    slow = write(tmp_path / "slow.mkv", pictures(3), times_ms=[0, 100, 3000], sound=("flac", 48000, 0.1))
    assert taken_from(slow, 2.0) == 2.0 and taken_from(slow, 0.02) == 0.0 and taken_from(slow, 0.0) == 0.0
