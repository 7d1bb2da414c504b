"""TAEHV's decoder: the original's numbers; the same as a stream and in tiles; in a pipeline; other files refused."""

from __future__ import annotations

import functools
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.diffusers_folder import golden as folder_golden
from helpers.diffusers_folder import write_folder
from taehv_check import check, names_of, weights

import sora_jax
from sora_jax.checkpoints.taehv_weights import load_taehv
from sora_jax.errors import UserError
from sora_jax.models.taehv import TAEHV
from sora_jax.models.tiles import Tiles, decode_stream

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = {"2_1": (16, (4, 8, 8)), "2_2": (48, (4, 16, 16))}
decode = jax.jit(TAEHV.decode)


@functools.cache
def golden(version: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / f"taehv_{version}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taehv")

    def write(version: str, **changed: np.ndarray) -> pathlib.Path:
        path = folder / f"{version}{'_'.join(changed)}.safetensors"
        tensors = weights(names_of(golden(version))) | {
            key.replace("__", "."): array for key, array in changed.items()
        }
        safetensors.numpy.save_file({key: array for key, array in tensors.items() if array.size}, path)
        return path

    return write


@pytest.fixture(scope="module")
def model(file_of):
    return load_taehv(file_of("2_1"), *SHAPES["2_1"])


@pytest.mark.parametrize("version", SHAPES)
def test_it_computes_what_the_original_computes(file_of, version):
    model = load_taehv(file_of(version), *SHAPES[version])
    assert check(golden(version), lambda latent: decode(model, latent)) < 1e-4


def test_a_stream_gives_what_the_whole_gives(model):
    latent = golden("2_1")["latent"]
    parts = list(decode_stream(model, latent, Tiles(chunk=1)))
    assert [len(part) for part in parts] == [1, 4, 4]
    np.testing.assert_allclose((np.concatenate(parts) + 1) / 2, golden("2_1")["clip"], atol=1e-4)


@pytest.mark.slow
def test_tiles_differ_from_the_whole_by_less_than_rounding_to_bytes_does(model):
    latent = np.random.default_rng(0).standard_normal((1, 26, 30, 16)).astype(np.float32)
    (whole,) = decode_stream(model, latent, Tiles(32))
    (tiled,) = decode_stream(model, latent, Tiles(24, model.tiles.halo, model.tiles.blend))
    assert 0 < np.sqrt(np.mean((tiled - whole) ** 2)) < 1 / 255


def test_a_pipeline_makes_its_frames_with_it(tmp_path):
    """The tiny folder's latents have four channels; the decoder's first layer is cut to them."""
    kept = folder_golden("wan_pipeline_unipc")
    tensors = weights(names_of(golden("2_1")))
    tensors["decoder.1.weight"] = np.ascontiguousarray(tensors["decoder.1.weight"][:, :4])
    safetensors.numpy.save_file(tensors, path := tmp_path / "taew.safetensors")
    folder = write_folder(tmp_path / "tiny-wan", kept)
    own, preview = sora_jax.load(folder), sora_jax.load(folder, decoder=path)
    job = preview.request_job("a cat", size=(32, 48), frames=5, steps=1)
    latents = preview.sample_latents([job])[0]
    frames = preview.decode_job(job, latents).whole().frames
    expected = decode(load_taehv(path, 4, (4, 8, 8)), latents.transpose(1, 2, 3, 0)[None])
    assert np.abs(frames / 127.5 - 1 - np.asarray(expected)[0]).max() < 0.005
    assert np.abs(frames.astype(int) - own.decode_job(job, latents).whole().frames).max() > 10


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        (
            {},
            (48, (4, 16, 16)),
            "decodes latents of 16 channels and 4x8x8 pixels, the model's have 48 channels",
        ),
        ({"decoder__5__conv__2__weight": np.zeros(0, np.float32)}, SHAPES["2_1"], "conv.2.weight is missing"),
        (
            {"decoder__3__conv__2__weight": np.zeros(0, np.float32)},
            SHAPES["2_1"],
            "has no convolution decoder.3",
        ),
        ({"decoder__22__bias": np.zeros(4, np.float32)}, SHAPES["2_1"], "decoder.22.bias has shape 4"),
    ],
)
def test_other_files_are_refused(file_of, changed, shape, message):
    with pytest.raises(UserError, match=message):
        load_taehv(file_of("2_1", **changed), *shape)
