"""Weights as files: every floating type, parts with an index, and what can't be read or saved, said in a sentence."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints import bundle as bundles
from sora_jax.checkpoints.bundle import load_bundle, measure_latents, save_bundle
from sora_jax.errors import UserError
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.models.weights import SAVED, map_weights, read_weights, release, write_parts, write_weights

# Exact in every type.
WEIGHTS = {
    "a": np.array([[0.5, -1.75, 0.0], [2.0, 448.0, -0.25]], np.float32),
    "b": np.float32(3.0),
    "c": np.zeros((0, 2), np.float32),
}


@pytest.mark.parametrize("dtype", SAVED)
def test_every_type_comes_back_as_it_was(dtype, tmp_path):
    file = tmp_path / "w.safetensors"
    strided = {"turned": WEIGHTS["a"].T, "every second": np.repeat(WEIGHTS["a"], 2, 1)[:, ::2]}
    write_weights(WEIGHTS | strided, file, dtype)
    for read in (read_weights(file), map_weights(file)):
        assert read.keys() == (WEIGHTS | strided).keys()
        for name, wanted in (WEIGHTS | strided).items():
            assert read[name].dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
            assert read[name].shape == wanted.shape and not read[name].flags.writeable
            np.testing.assert_array_equal(read[name].astype(np.float32), wanted)


@pytest.mark.parametrize(
    ("dtype", "most"), [("float16", 65504), ("float8_e4m3fn", 448), ("float8_e5m2", 57344)]
)
def test_a_weight_that_a_type_does_not_hold_is_refused(dtype, most, tmp_path):
    with pytest.raises(
        UserError, match=f"'a' reaches 100000, and {dtype} holds up to {most}: save .* bfloat16"
    ):
        write_weights({"a": np.array([1.0, -1e5], np.float32)}, tmp_path / "w.safetensors", dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["int8", "float9", "float64", ""])
def test_a_type_that_is_none_for_weights_is_refused(dtype, tmp_path):
    with pytest.raises(UserError, match=f"can't be saved as '{dtype}': choose one of float32, bfloat16"):
        write_weights(WEIGHTS, tmp_path / "w.safetensors", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SAVED)
def test_a_bundle_loads_in_every_type(dtype, tmp_path):
    bundle = tiny_bundle()
    save_bundle(bundle, tmp_path, dtype)
    loaded = load_bundle(tmp_path)
    bits = {"float32": 24, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}[dtype]
    for wanted, got in zip(jax.tree.leaves(bundle.dit), jax.tree.leaves(loaded.dit), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=2.0**-bits, atol=2.0**-9 if bits < 8 else 1e-7)


def test_a_bundle_of_another_architecture_names_one_tensor_and_counts_the_rest(tmp_path):
    save_bundle(tiny_bundle(), tmp_path)
    file = tmp_path / "dit.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if not n.startswith("patch_in")}, file)
    with pytest.raises(
        UserError, match=r"'patch_in.bias' is absent in the file and \(32,\) .*, and 1 more differ"
    ):
        load_bundle(tmp_path)


def save_in_parts(folder: pathlib.Path) -> pathlib.Path:
    parts = {"w-1.safetensors": ["a", "b"], "w-2.safetensors": ["c"]}
    for file, names in parts.items():
        write_weights({name: WEIGHTS[name] for name in names}, folder / file, "float32")
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "w.safetensors.index.json").write_text(json.dumps(index))
    return folder / "w.safetensors"


@pytest.mark.parametrize("read_file", [read_weights, map_weights])
def test_parts_with_an_index_are_read_as_one_file(read_file, tmp_path):
    read = read_file(save_in_parts(tmp_path))
    assert read.keys() == WEIGHTS.keys()
    for name, wanted in WEIGHTS.items():
        np.testing.assert_array_equal(read[name], wanted)


def test_beside_a_single_file_the_index_is_mapped(tmp_path):
    """As a model that was saved in parts over an older single file: the parts are newer."""
    file = save_in_parts(tmp_path)
    write_weights({"a": WEIGHTS["a"] + 1}, file, "float32")
    np.testing.assert_array_equal(map_weights(file)["a"], WEIGHTS["a"])
    assert map_weights(file).keys() == WEIGHTS.keys()
    assert read_weights(file).keys() == {"a"}


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").is_file(), reason="only Linux says what is in memory"
)
def test_what_is_mapped_is_in_memory_only_while_it_is_used(tmp_path):
    def mapped() -> float:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) / 1024

    write_weights({"large": np.ones((32, 1 << 18), np.float32)}, tmp_path / "w.safetensors", "float32")
    before = mapped()
    large = map_weights(tmp_path / "w.safetensors")["large"]
    assert mapped() - before < 4
    assert large[1:].sum() == 31 << 18
    assert mapped() - before > 28
    release(large[3])
    assert mapped() - before < 4
    assert large[1:].sum() == 31 << 18
    release(np.ones(3))  # of an array that is no file's


@pytest.mark.parametrize("read_file", [read_weights, map_weights])
def test_what_cannot_be_read_is_told_in_a_sentence(read_file, tmp_path):
    file = save_in_parts(tmp_path)
    index = tmp_path / "w.safetensors.index.json"
    with pytest.raises(UserError, match="other.safetensors is missing"):
        read_file(tmp_path / "other.safetensors")
    whole = (tmp_path / "w-1.safetensors").read_bytes()
    for damaged in (b"", b"version https://git-lfs", whole[:-1], whole[:9], whole + b"\0"):
        (tmp_path / "w-1.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="w-1.safetensors can't be read, it is damaged or cut short"):
            read_file(file)
    (tmp_path / "w-1.safetensors").unlink()
    with pytest.raises(UserError, match="w-1.safetensors is missing"):
        read_file(file)
    for wrong in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(wrong)
        with pytest.raises(UserError, match="index.json can't be read"):
            read_file(file)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="which is not in its folder"):
        read_file(file)


def save_header(entries: object, data: bytes, folder: pathlib.Path) -> pathlib.Path:
    header = json.dumps(entries).encode()
    (folder / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder / "w.safetensors"


@pytest.mark.parametrize("read_file", [read_weights, map_weights])
def test_a_type_that_is_unknown_is_named(read_file, tmp_path):
    file = save_header({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}, b"\0\0", tmp_path)
    with pytest.raises(UserError, match="holds 'a' as F8_E8M0, which can't be read: convert it"):
        read_file(file)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "U8", "shape": [4]}},
        {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}},
        {"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        {"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}},
        {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"},
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(entries, tmp_path):
    with pytest.raises(UserError, match="w.safetensors can't be read, it is damaged"):
        read_weights(save_header(entries, b"\0\1\2\3", tmp_path))


@pytest.fixture(scope="module")
def vae() -> VAE:
    config = VAEConfig(
        channels=3,
        encoder_widths=(4, 4, 4),
        decoder_widths=(4, 4, 4),
        encoder_blocks=(0, 0, 0),
        decoder_blocks=(0, 0, 0),
    )
    return VAE(config, rngs=nnx.Rngs(0))


CLIPS = [np.random.default_rng(seed).integers(0, 256, (1, 16, 16, 3), np.uint8) for seed in range(3)]


@pytest.mark.parametrize("left", [0.0, 1e-9])
def test_a_channel_that_collapsed_gets_a_deviation_to_divide_by(left, vae):
    silent = jax.tree.map(lambda leaf: leaf, vae)
    silent.to_moments.kernel[...] = silent.to_moments.kernel[...].at[:, 1].multiply(left)
    measured = measure_latents(silent, CLIPS)
    others = np.array(measured.config.latent_std)[[0, 2]]
    assert others.min() > 1e-2
    assert measured.config.latent_std[1] == pytest.approx(bundles.MIN_DEVIATION * others.max(), rel=1e-4)
    latent = np.asarray(measured.to_latent(CLIPS[0][None] / np.float32(127.5) - 1))
    assert np.isfinite(latent).all() and np.abs(latent[..., 1]).max() < 1e-2
    assert latent[..., [0, 2]].std() > 0.3


def test_small_latents_keep_their_deviation(vae):
    small = jax.tree.map(lambda leaf: leaf, vae)
    small.to_moments.kernel[...] = small.to_moments.kernel[...] * 1e-4
    ours, whole = (np.array(measure_latents(one, CLIPS).config.latent_std) for one in (small, vae))
    np.testing.assert_allclose(ours, 1e-4 * whole, rtol=1e-3)


def test_an_autoencoder_that_codes_nothing_is_refused(vae):
    dumb = jax.tree.map(jnp.zeros_like, vae)
    with pytest.raises(UserError, match="codes 3 clips as the same numbers everywhere"):
        measure_latents(dumb, CLIPS)
    with pytest.raises(UserError, match="no clip to measure"):
        measure_latents(vae, [])


def test_parts_are_written_with_an_index_and_read_back(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        f"layer.{i}": generator.standard_normal((2, 3)).astype(dtype)
        for i, dtype in enumerate((np.float32, np.float16, ml_dtypes.bfloat16, np.float32))
    }
    path = tmp_path / "model.safetensors"
    write_parts(tensors.items(), path, part_bytes=40)
    names = [file.name for file in sorted(tmp_path.iterdir())]
    assert names == [
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 + 12 + 12 + 24
    for name, tensor in map_weights(path).items():
        assert tensor.dtype == tensors[name].dtype
        np.testing.assert_array_equal(tensor, tensors[name])
    write_parts(tensors.items(), tmp_path / "one" / "model.safetensors", "float32")
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
