"""Folders as people have them: what is taken, what is left out, what is damaged, and that all of it is said."""

import os
import pathlib
import re
import shutil

import av
import numpy as np
import pytest
from helpers.film_files import pictures, write
from PIL import Image

from sora_jax.data.files import find_files, read_caption
from sora_jax.data.footage import Footage
from sora_jax.data.survey import listed, survey
from sora_jax.errors import UserError
from sora_jax.media.video import Video


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> pathlib.Path:
    """Three seconds whose index stands in front, so that it opens however much of its end is missing."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    return Video(noise, 8).save(tmp_path_factory.mktemp("film") / "film.mp4")


def put(film: pathlib.Path, *places: pathlib.Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, place)


def names(root: pathlib.Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in find_files(root).files]


def test_hidden_and_foreign_files_are_left_out(tmp_path, film):
    kept = ("a.mp4", "day 1/b.MP4", "x.y/c.mov")
    left = (
        *(".Trash-1000/files/deleted.mp4", ".ipynb_checkpoints/a-checkpoint.mp4", "._a.mp4", ".hidden.mp4"),
        *(
            "@eaDir/a.mp4/thumb.mp4",
            "__MACOSX/a.mp4",
            "$RECYCLE.BIN/d.mp4",
            "lost+found/e.mp4",
            "x.y/.git/f.mp4",
        ),
    )
    put(film, *(tmp_path / name for name in kept + left))
    assert names(tmp_path) == sorted(kept)
    # A root is taken whatever it is called.
    assert names(tmp_path / ".Trash-1000") == ["files/deleted.mp4"]


def test_a_folder_named_like_a_film_is_a_folder(tmp_path, film):
    put(film, tmp_path / "clip.mp4" / "a.mp4", tmp_path / "b.mp4")
    (tmp_path / "empty.mov").mkdir()
    assert names(tmp_path) == ["b.mp4", "clip.mp4/a.mp4"]


def test_links_are_followed_once(tmp_path, film):
    put(film, tmp_path / "disk/part/b.mp4", tmp_path / "films/a.mp4")
    films = tmp_path / "films"
    os.symlink(tmp_path / "disk/part", films / "part")
    os.symlink(tmp_path / "disk/part", films / "the same")
    os.symlink(films, films / "round")
    os.symlink(films / "a.mp4", films / "z.mp4")
    os.symlink(tmp_path / "gone.mp4", films / "dangling.mp4")
    assert names(films) == ["a.mp4", "dangling.mp4", "part/b.mp4"]
    found = survey(str(films))
    assert [film.name for film in found.source_files] == ["a.mp4", "part/b.mp4"]
    assert found.skipped == {str(films / "dangling.mp4"): "can't be opened: No such file or directory"}


def test_captions_are_found_in_any_capitals_and_encodings(tmp_path, film):
    texts = {
        "a.txt": b"a red  circle\nmoves",
        "b.TXT": b"\xef\xbb\xbfa circle\r\nmoves\r\n",
        "c.Txt": "a circle é".encode("utf-16"),
        "d.txt": b"  \n",
        "f.txt": b"beside no video",
    }
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    put(film, *(tmp_path / f"{name}.mp4" for name in "ABCDE".lower()))
    found = survey(str(tmp_path))
    assert [film.caption for film in found.source_files] == [
        "a red circle moves",
        "a circle moves",
        "a circle é",
        "",
        "",
    ]
    assert found.captions == 3
    assert "1 text without a video of that name: f.txt" in found.notes
    # Of a single file too.
    assert survey(str(tmp_path / "b.mp4")).source_files[0].caption == "a circle moves"
    clip = Footage(str(tmp_path / "b.mp4"), resolution=16, min_seconds=0.5)[0]
    assert clip.captions == {"short": "a circle moves"} and clip.timed == ((0.0, "a circle moves"),)


def test_posters_and_other_files_are_left_out_and_counted(tmp_path, film):
    put(film, tmp_path / "a.mp4")
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("list.json", "notes.md", "more.json", "Makefile", "README.md", "LICENSE", "readme.txt"):
        (tmp_path / name).write_text("x")
    found = survey(str(tmp_path))
    assert [film.name for film in found.source_files] == ["a.mp4", "b.png"]
    assert found.notes == (
        "1 picture named like a video of its folder left out",
        "3 files of other kinds left out: 2 .json, 1 no suffix",
    )


def test_what_looks_otherwise_here_is_said_of_all_files_together(tmp_path, film):
    put(film, tmp_path / "plain.mp4")
    for name, transfer in (("a", 16), ("b", 16), ("c", 8)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", 8)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            stream.codec_context.color_trc = transfer
            for _ in range(8):
                container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode(None))
    summary = str(Footage(str(tmp_path), resolution=16, min_seconds=0.5).summary())
    assert (
        "note: each of a.mp4, b.mp4 has HDR colours, which look pale here: convert it to SDR first" in summary
    )
    assert "note: c.mp4 has linear or logarithmic brightness" in summary and "plain.mp4 has" not in summary
    assert ".." not in summary


@pytest.fixture
def mixed(tmp_path, film) -> pathlib.Path:
    """Two good files, and one of each kind of damage that shows when files are opened."""
    put(film, *(tmp_path / f"{name}.mp4" for name in ("good", "better", "cut", "words", "end")))
    data = film.read_bytes()
    for name, share in (("cut", 0.6), ("end", 0.2)):
        (tmp_path / f"{name}.mp4").write_bytes(data[: int(share * len(data))])
    (tmp_path / "words.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "nothing.webm").write_bytes(b"")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    write(tmp_path / "sound.avi", pictures(4), fps=8, codec="mpeg4")
    (tmp_path / "sound.avi").write_bytes((tmp_path / "sound.avi").read_bytes()[:300])
    return tmp_path


BAD = ("cut.mp4", "end.mp4", "nothing.webm", "sound.avi", "text.mp4", "torn.png", "words.txt")


def test_all_that_is_damaged_is_found_at_once_and_skipped(mixed):
    source = Footage(str(mixed), resolution=32, min_seconds=0.5, clips=20)
    summary = source.summary()
    assert sorted(summary.skipped) == [str(mixed / name) for name in BAD]
    assert re.match(r"ends at 1\.\d of 3\.0 seconds", summary.skipped[str(mixed / "cut.mp4")])
    assert (summary.videos, summary.captions) == (3, 0)
    assert summary.metrics() == {"data/skipped_files": 7, "data/replaced_clips": 0}
    text = str(summary)
    assert all(name in text for name in BAD) and not re.search(r"\.[.)]", text)
    assert "3 videos (9.0 seconds); 0 of 3 with captions; 3 of 32×32; 3 of 8 fps" in text
    assert {source[index].key.split("@")[0] for index in range(20)} == {"better.mp4", "good.mp4"}


def test_all_that_is_damaged_is_refused_in_one_sentence(mixed):
    with pytest.raises(UserError, match="7 files at .* can't be read") as refused:
        Footage(str(mixed), resolution=32, damaged="refuse")
    assert all(name in str(refused.value) for name in BAD)
    assert "config.data.damaged='skip'" in str(refused.value)


def test_a_folder_of_damaged_files_alone_is_refused(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"holds no video that can be read: .*broken.mp4 \("):
        survey(str(tmp_path))


def test_a_file_is_looked_at_again_once_it_is_another(tmp_path, film):
    data = film.read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    put(film, tmp_path / "b.mp4")
    assert len(survey(str(tmp_path)).skipped) == 1
    put(film, tmp_path / "a.mp4")
    assert survey(str(tmp_path)).skipped == {}


def test_a_webm_without_a_duration_is_measured(tmp_path):
    write(tmp_path / "a.webm", pictures(20), fps=10, codec="libvpx")
    data = (tmp_path / "a.webm").read_bytes()
    # As a browser's recorder leaves it: the element of the whole's duration is void, and so is the track's tag.
    data = data.replace(b"\x44\x89\x88", b"\xec\x89\x88", 1).replace(b"DURATION", b"DURATIOX")
    (tmp_path / "a.webm").write_bytes(data)
    with av.open(str(tmp_path / "a.webm")) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    put_beside = write(tmp_path / "b.mp4", pictures(20), fps=10)
    found = survey(str(tmp_path))
    assert found.skipped == {} and put_beside.exists()
    assert [film.seconds for film in found.source_files] == pytest.approx([2, 2], abs=0.15)


def test_what_is_listed_is_bounded():
    reasons = {f"{number}.mp4": "broken" for number in range(30)}
    assert listed(reasons).endswith("19.mp4 (broken) and 10 more")


def test_read_caption_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.txt"):
        read_caption(tmp_path / "a.txt")
