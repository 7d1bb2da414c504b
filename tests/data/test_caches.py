"""Caches are kept under contents: whatever is edited is seen, whatever its name, size and times."""

import dataclasses
import functools
import os
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.data import encode as encoding
from sora_jax.data.data_config import DataConfig
from sora_jax.data.encode import LatentsConfig, encode_sources
from sora_jax.data.footage import Footage
from sora_jax.data.frame_cache import cached_frames
from sora_jax.data.latents import earlier_cache
from sora_jax.data.sources import make_sources
from sora_jax.media.digests import array_digest, file_digest, value_digest
from sora_jax.media.video import Video
from sora_jax.models import text as text_module
from sora_jax.models.text import TextConfig, text_digest
from sora_jax.models.vae import VAE, VAEConfig

TINY = VAEConfig(
    strides=((2, 2, 2), (2, 2, 2)),
    channels=4,
    encoder_widths=(8, 8),
    encoder_blocks=(0, 0),
    decoder_widths=(8, 8),
    decoder_blocks=(0, 0),
)
TEXT = TextConfig(kind="hash", width=8)
DATA = DataConfig(durations=(0.0, 0.5), resolutions=(16,), grid=(4, 8, 8))
LATENTS = LatentsConfig(clips=6, batch=4)


@functools.cache
def autoencoder(config: VAEConfig = TINY, seed: int = 0) -> VAE:
    return VAE(config, rngs=nnx.Rngs(seed))


def save(path, shade: int) -> None:
    Video(np.full((12, 16, 24, 3), shade, np.uint8), 8.0).save(path, crf=0)


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name, shade in (("a", 40), ("b", 200)):
        save(folder / f"{name}.mp4", shade)
        (folder / f"{name}.txt").write_text(f"film {name}")
    return folder


def parts(films, data=DATA, vae_seed: int = 0, text=TEXT, latents=LATENTS, config=TINY) -> dict[str, str]:
    own = dataclasses.replace(data, source=str(films))
    source = Footage(str(films), resolution=16, durations=data.durations)
    return encoding._identify(latents, own, source, autoencoder(config, vae_seed), text)


def differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def replace_in_place(path, content: bytes) -> None:
    """Another content of the same size under the same times, as some tools copy."""
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns


def test_every_edit_of_the_footage_is_seen(films):
    before = parts(films)
    assert parts(films) == before
    edits = {
        "caption edited": (lambda: (films / "a.txt").write_text("film c"), ["captions"]),
        "caption removed": (lambda: (films / "b.txt").unlink(), ["captions"]),
        "film added": (lambda: save(films / "c.mp4", 90), ["files", "captions"]),
        "film removed": (lambda: (films / "c.mp4").unlink(), ["files", "captions"]),
        "film replaced": (lambda: save(films / "a.mp4", 41), ["files"]),
        "film renamed": (lambda: (films / "a.mp4").rename(films / "z.mp4"), ["files", "captions"]),
    }
    for name, (edit, wanted) in edits.items():
        edit()
        after = parts(films)
        assert differing(before, after) == wanted, name
        before = after


def test_a_film_replaced_by_one_of_the_same_size_and_times_is_seen(films):
    path = films / "a.mp4"
    content = bytearray(path.read_bytes())
    before, first = parts(films), file_digest(path)
    place = content.rindex(b"Lavf")  # a name of the program that wrote it: the pictures stay readable
    content[place : place + 4] = b"Lavg"
    replace_in_place(path, bytes(content))
    assert file_digest(path) != first
    assert differing(before, parts(films)) == ["files"]


def test_a_folder_that_was_moved_is_the_same(films, tmp_path):
    before = parts(films)
    moved = shutil.copytree(films, tmp_path / "elsewhere")
    assert parts(moved) == before


def test_every_weight_and_setting_is_seen(films):
    before = parts(films)
    changes = {
        "autoencoder": [{"vae_seed": 1}, {"config": dataclasses.replace(TINY, latent_mean=(0.5,))}],
        "text encoder": [
            {"text": TextConfig(kind="hash", width=9)},
            {"text": dataclasses.replace(TEXT, max_tokens=9)},
        ],
        "config.data": [
            {"data": dataclasses.replace(DATA, **change)}
            for change in (
                {"seed": 1},
                {"resolutions": (24,)},
                {"rates": (4.0,)},
                {"aspects": ("1:1",)},
                {"max_frames": 5},
                {"crop": "square"},
            )
        ],
        "config.latents": [
            {"latents": dataclasses.replace(LATENTS, **change)}
            for change in ({"batch": 2}, {"layouts": {"last": 1.0}})
        ],
    }
    for name, several in changes.items():
        for change in several:
            assert differing(before, parts(films, **change)) == [name], change


@pytest.mark.parametrize("name", text_module._FILES)
def test_a_text_encoder_of_the_same_name_with_other_files_is_seen(tmp_path, monkeypatch, name):
    monkeypatch.setenv(text_module.DIRECTORY_VARIABLE, str(tmp_path))
    for file in text_module._FILES:
        (tmp_path / file).write_bytes(file.encode())
    before = text_digest(TextConfig())
    assert text_digest(TextConfig()) == before
    replace_in_place(tmp_path / name, name.upper().encode())
    assert text_digest(TextConfig()) != before


def test_decoded_frames_are_those_of_the_file_as_it_is_now(films, tmp_path):
    path, folder = films / "a.mp4", str(tmp_path / "frames")
    first = cached_frames(folder, str(path), 8.0, 16)
    assert abs(int(first[0, 0, 0, 0]) - 40) < 4
    stat = path.stat()
    save(path, 120)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert abs(int(cached_frames(folder, str(path), 8.0, 16)[0, 0, 0, 0]) - 120) < 4
    shutil.copy(path, films / "copy.mp4")
    written = len(os.listdir(folder))
    cached_frames(folder, str(films / "copy.mp4"), 8.0, 16)
    assert len(os.listdir(folder)) == written + 1  # another name, so that a person finds it
    assert len(cached_frames(folder, str(path), 8.0, 8)[0]) == 8


def test_an_edited_caption_encodes_text_alone(films, tmp_path, capsys, monkeypatch):
    vae, folder = autoencoder(), tmp_path / "latents"
    data = dataclasses.replace(DATA, source=str(films))
    first = encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    (films / "a.txt").write_text("another film")
    fresh = encode_sources(LATENTS, data, vae, TEXT, tmp_path / "fresh", make_sources(data))
    capsys.readouterr()
    monkeypatch.setattr(Footage, "read", lambda *args: pytest.fail("pixels were read"))
    edited = encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    assert f"captions. The latents in {folder} are kept, only text is encoded" in capsys.readouterr().err
    for new, wanted in zip(edited, fresh, strict=True):
        jax.tree.map(np.testing.assert_array_equal, new, wanted)
    wider = encode_sources(LATENTS, data, vae, TextConfig(kind="hash", width=12), folder, make_sources(data))
    assert {record["captions"]["short"]["text"].shape[1] for record in wider} == {12}
    assert {cache.folder for cache in (*first.caches, *edited.caches, *wider.caches)} == {*folder.iterdir()}
    monkeypatch.undo()
    save(films / "b.mp4", 90)
    encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    assert "as these changed: files. 6 clips are encoded again" in capsys.readouterr().err


def test_what_changed_is_said_and_latents_are_encoded_again(films, tmp_path, capsys):
    vae, folder = autoencoder(), tmp_path / "latents"
    data = dataclasses.replace(DATA, source=str(films))
    first = encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    again = encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    assert "can't be used" not in capsys.readouterr().err
    assert [cache.folder for cache in again.caches] == [first.caches[0].folder]
    (films / "a.txt").write_text("film c")
    (films / "b.txt").write_text("film c")
    edited = encode_sources(LATENTS, data, vae, TEXT, folder, make_sources(data))
    assert "these changed: captions." in capsys.readouterr().err
    for old, new in zip(first, edited, strict=True):
        np.testing.assert_array_equal(old["latent"], new["latent"])
        assert not np.array_equal(old["captions"]["short"]["text"], new["captions"]["short"]["text"])
    assert earlier_cache(folder, {"source": "1"}) is None


def test_digests_tell_types_and_shapes_apart():
    zeros = np.zeros(4, np.float32)
    arrays = [zeros, zeros.reshape(2, 2), zeros.astype(np.int32), zeros[:3], zeros + 1]
    assert len({array_digest([array]) for array in arrays}) == len(arrays)
    assert array_digest([zeros[:2], zeros[2:]]) != array_digest([zeros])
    assert array_digest([jax.numpy.zeros(4)]) == array_digest([zeros])
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1}) != value_digest({"a": 2, "b": 1})


def test_a_field_younger_than_stored_caches_keeps_them_valid_at_its_default(films):
    settings = dataclasses.asdict(DATA)
    for name in ("source", "cache", *(name for name, _ in encoding.YOUNGER)):
        del settings[name]
    assert parts(films)["config.data"] == value_digest(settings)


def test_clips_that_are_not_stored_are_encoded_alike_when_they_are_read(films, tmp_path):
    data, vae = dataclasses.replace(DATA, source=str(films)), autoencoder()
    sources = make_sources(data)
    stored = encode_sources(LATENTS, data, vae, TEXT, tmp_path / "stored", sources)
    unstored = encode_sources(
        dataclasses.replace(LATENTS, store=False), data, vae, TEXT, tmp_path / "no", sources
    )
    assert not (tmp_path / "no").exists() and len(unstored) == len(stored)
    for once, each in zip((stored[i] for i in range(3)), (unstored[i] for i in range(3)), strict=True):
        assert once["key"] == each["key"]
        np.testing.assert_allclose(each["latent"], once["latent"], rtol=2e-3, atol=2e-3)
    with pytest.raises(IndexError):
        unstored.caches[0][len(unstored)]
