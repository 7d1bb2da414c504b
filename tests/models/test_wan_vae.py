"""Wan's autoencoders: diffusers' numbers; the same as a stream, in tiles and as a whole; nothing dropped in silence."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.slow import rest_slow
from wan_vae_check import check, decode, encode, model_of

from sora_jax.backend import ONEDNN
from sora_jax.checkpoints.store import named_leaves
from sora_jax.checkpoints.wan_vae_weights import diffusers_name, load_wan_vae, stored_name, stored_shape
from sora_jax.errors import UserError
from sora_jax.models import tiles as module
from sora_jax.models import wan_layers
from sora_jax.models.conv import ConvCache, causal_conv, patchify, unpatchify
from sora_jax.models.tiles import Tiles, decode_stream, encode_stream
from sora_jax.models.wan_vae import WanVAE
from sora_jax.models.wan_vae_config import WAN_2_1, WAN_2_2, WanVAEConfig

ROOT = pathlib.Path(__file__).parents[2]

VERSIONS = ("2_1", "2_2")
CHUNKINGS = [(2, 1), (1, 1, 1)]  # in latent frames
FULL_HALO = 9  # how far the tiny decoders reach; the encoders reach 5
RNG = np.random.default_rng(0)


@functools.cache
def golden(version: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / f"wan_vae_tiny_{version}.npz") as file:
        return dict(file)


@functools.cache
def tiny(version: str) -> WanVAE:
    return model_of(golden(version))


@functools.cache
def settings(version: str) -> dict:
    return json.loads(str(golden(version)["config"]))


def tensors(version: str) -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in json.loads(str(golden(version)["names"]))}


@functools.cache
def clip(version: str) -> np.ndarray:
    return golden(version)["frames"][None] / np.float32(127.5) - 1


@functools.cache
def whole(version: str) -> tuple[np.ndarray, ...]:
    """Mean and log variance of the clip, and the clip of the golden latent."""
    mean, logvar, _ = encode(tiny(version), clip(version))
    return np.asarray(mean), np.asarray(logvar), np.asarray(decode(tiny(version), latent(version))[0])


def latent(version: str) -> np.ndarray:
    return golden(version)["latent"][None]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_computes_what_diffusers_computes(version):
    errors = check(golden(version))
    assert len(errors) == 9  # mean, log variance and clip of 1, 5 and 9 frames
    assert max(errors.values()) <= 1e-4, errors


def test_bfloat16_is_no_further_off_than_diffusers_own():
    model, own = model_of(golden("2_1"), "bfloat16"), golden("2_1")
    ours = encode(model, clip("2_1"))[0], decode(model, latent("2_1"))[0]
    for coded, name, bound in zip(ours, ("mean_9", "clip_9"), own["bfloat16"][1::2], strict=True):
        error = np.sqrt(np.mean(np.square(coded[0] - own[name]))) / own[name].std()
        assert 1e-3 < error < 1.2 * bound


@pytest.mark.parametrize("version", rest_slow(VERSIONS))
@pytest.mark.parametrize("chunks", rest_slow(CHUNKINGS))
def test_a_stream_is_encoded_and_decoded_as_the_whole(version, chunks):
    model, frames = tiny(version), clip(version)
    means, logvars, clips, past, cache, start = [], [], [], None, None, 0
    for count in chunks:
        begin, end = max(4 * start - 3, 0), 4 * (start + count) - 3
        mean, logvar, past = encode(model, frames[:, begin:end], past)
        decoded, cache = decode(model, latent(version)[:, start : start + count], cache)
        means, logvars, clips = [*means, mean], [*logvars, logvar], [*clips, decoded]
        start += count
    for parts, expected in zip((means, logvars, clips), whole(version), strict=True):
        np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5 * expected.std())


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_sees_what_comes_later(version):
    """A change of frame f shows from latent frame ⌈f/4⌉ on, one of latent frame j from frame 4j − 3 on."""
    mean, _, decoded = whole(version)
    for frame in range(9):
        frames = clip(version).copy()
        frames[:, frame] *= -1
        shown = np.abs(encode(tiny(version), frames)[0] - mean).max(axis=(0, 2, 3, 4))
        first = -(-frame // 4)
        assert (shown[:first] < 1e-5).all() and shown[first] > 1e-3, frame
    for j in range(3):
        latents = latent(version).copy()
        latents[:, j] += 1
        shown = np.abs(decode(tiny(version), latents)[0] - decoded).max(axis=(0, 2, 3, 4))
        first = max(0, 4 * j - 3)
        assert (shown[:first] < 1e-5).all() and (shown[first : 4 * j + 1] > 1e-3).all(), j


@pytest.mark.slow
def test_there_is_a_gradient_of_every_parameter():
    """Of Wan 2.2, whose layers are 2.1's and shortcuts."""

    def loss(model: WanVAE, frames: jax.Array, latents: jax.Array) -> jax.Array:
        mean, logvar = model.encode(frames)
        return jnp.mean(mean**2) + jnp.mean(logvar**2) + jnp.mean(model.decode(latents) ** 2)

    given = tiny("2_2"), clip("2_2")[:, :5], latent("2_2")[:, :2]
    for name, gradient in named_leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)).items():
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_the_norm_of_zeros_has_a_finite_gradient():
    norm = wan_layers.RMSNorm(3)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 3)))
    assert np.isfinite(gradient).all()
    x = RNG.standard_normal((5, 3)).astype(np.float32)
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) * 3**0.5
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


@pytest.mark.parametrize("version", rest_slow(VERSIONS))
def test_tiles_with_the_full_halo_are_the_whole_frame(version):
    """Though attention sees whole frames: it runs on them."""
    model, (_, high, wide) = tiny(version), tiny(version).config.compression
    frames = RNG.integers(0, 256, (1, 16 * high, 34 * wide, 3), np.uint8)
    latents = RNG.standard_normal((1, 16, 34, 4)).astype(np.float32)
    for stream, given in ((encode_stream, frames), (decode_stream, latents)):
        one, full, rough = (
            np.concatenate(list(stream(model, given, tiles)))
            for tiles in (Tiles(40), Tiles(21, FULL_HALO, 1), Tiles(21, 0, 1))
        )
        assert np.abs(full - one).max() < 1e-4 * one.std() < 1e-2 < np.abs(rough - one).max()


@pytest.mark.slow
def test_streams_are_the_chunks_of_the_normalised_latents():
    model, own = tiny("2_1"), golden("2_1")
    mean, std = (np.array(values) for values in (model.config.latent_mean, model.config.latent_std))
    coded = list(encode_stream(model, own["frames"][:7]))
    assert [len(part) for part in coded] == [1, 1, 1]  # the last group is filled up
    np.testing.assert_allclose(np.concatenate(coded)[:2], (own["mean_9"][:2] - mean) / std, atol=1e-4)
    decoded = np.concatenate(list(decode_stream(model, (own["latent"] - mean) / std)))
    np.testing.assert_allclose(decoded, own["clip_9"], atol=1e-4)
    raw = jax.eval_shape(WanVAE.encode, model, clip("2_1"))[0]
    assert jax.eval_shape(WanVAE.to_latent, model, clip("2_1")).shape == raw.shape


def test_activations_of_a_tile_are_of_one_size_whatever_the_width():
    build = lambda config: jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))).tiles
    assert (build(WAN_2_1).size, build(WAN_2_2).size) == (64, 39)
    assert module.tiles_of(tiny("2_1")).chunk == 1


def test_attention_is_the_same_in_blocks_of_queries(monkeypatch):
    qkv = RNG.standard_normal((23, 3 * 8)).astype(np.float32)
    at_once = wan_layers._attend(qkv)
    monkeypatch.setattr(wan_layers, "QUERIES", 5)
    np.testing.assert_allclose(wan_layers._attend(qkv), at_once, atol=1e-6)
    scores = qkv[:, :8] @ qkv[:, 8:16].T / 8**0.5
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(at_once, weights @ qkv[:, 16:], atol=1e-5)


def test_a_convolution_of_doubled_cells_is_one_of_cells():
    x, kernel = RNG.standard_normal((2, 3, 4, 5, 6)), RNG.standard_normal((3, 3, 6, 7))
    doubled = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)
    expected = wan_layers.frame_conv(jnp.float32(doubled), jnp.float32(kernel), (1, 1), ((1, 1), (1, 1)))
    ours = wan_layers.doubled_conv(jnp.float32(x), jnp.float32(kernel))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_convolution_in_pairs_is_the_causal_convolution():
    x, kernel, back = (
        jnp.float32(RNG.standard_normal(shape))
        for shape in ((2, 6, 4, 5, 6), (3, 3, 3, 6, 7), (2, 4, 4, 5, 7))
    )
    ours, pull = jax.vjp(wan_layers.conv_in_pairs, x, kernel)
    expected, pull_expected = jax.vjp(causal_conv, x, kernel)
    for one, other in zip((ours, *pull(back)), (expected, *pull_expected(back)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "dtype", "flags", "in_pairs"),
    [
        (4, "float32", f"{ONEDNN}=true", True),
        (3, "float32", f"{ONEDNN}=true", False),
        (4, "bfloat16", f"{ONEDNN}=true", False),
        (4, "float32", "", False),
    ],
)
def test_when_a_convolution_goes_in_pairs(monkeypatch, frames, dtype, flags, in_pairs):
    calls, real = [], wan_layers.conv_in_pairs
    monkeypatch.setattr(wan_layers, "conv_in_pairs", lambda *given: calls.append(1) or real(*given))
    monkeypatch.setenv("XLA_FLAGS", flags)
    conv = wan_layers.WideConv(2, 3, 1.0, rngs=nnx.Rngs(0))
    out = jax.eval_shape(lambda x: conv(x, ConvCache()), jnp.ones((1, frames, 4, 4, 2), dtype))
    assert out.shape == (1, frames, 4, 4, 3) and out.dtype == dtype and bool(calls) == in_pairs


def test_patches_have_the_originals_order_and_can_be_undone():
    x = np.arange(2 * 3 * 4 * 6 * 3).reshape(2, 3, 4, 6, 3)
    patches = patchify(jnp.asarray(x), 2)
    assert patches.shape == (2, 3, 2, 3, 12)
    # Channels (C, X, Y) of a patch.
    np.testing.assert_array_equal(patches[1, 2, 1, 2].reshape(3, 2, 2), x[1, 2, 2:, 4:].transpose(2, 1, 0))
    np.testing.assert_array_equal(unpatchify(patches, 2), x)


@pytest.mark.parametrize("config", [WAN_2_1, WAN_2_2])
def test_the_published_shapes(config):
    """Parameters as published: 127 million (508 MB in float32), and 705 million for Wan 2.2."""
    model = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert round(count / 1e6) == (127 if config is WAN_2_1 else 705)
    side = config.compression[1]
    assert config.compression == (4, side, side) and side == (8 if config is WAN_2_1 else 16)
    mean, logvar = jax.eval_shape(WanVAE.encode, model, jnp.zeros((1, 9, 4 * side, 2 * side, 3)))
    assert mean.shape == logvar.shape == (1, 3, 4, 2, config.channels)
    back = jax.eval_shape(WanVAE.decode, model, mean)
    assert back.shape == (1, 9, 4 * side, 2 * side, 3) and back.dtype == jnp.float32


def test_the_originals_names_are_known():
    """As in Wan2.1_VAE.pth and Wan2.2_VAE.pth (read from diffusers' conversion script)."""
    pairs = {
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.0.residual.0.gamma": "encoder.down_blocks.0.norm1.gamma",
        "encoder.downsamples.3.shortcut.weight": "encoder.down_blocks.3.conv_shortcut.weight",
        "encoder.downsamples.5.time_conv.bias": "encoder.down_blocks.5.time_conv.bias",
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "decoder.middle.2.residual.6.bias": "decoder.mid_block.resnets.1.conv2.bias",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
        "decoder.head.2.weight": "decoder.conv_out.weight",
        "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.upsamples.14.residual.3.gamma": "decoder.up_blocks.3.resnets.2.norm2.gamma",
    }
    nested = {
        "encoder.downsamples.1.downsamples.0.residual.2.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.weight": "encoder.down_blocks.1.downsampler.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.bias": "decoder.up_blocks.0.upsampler.resample.1.bias",
        "decoder.upsamples.2.upsamples.0.shortcut.bias": "decoder.up_blocks.2.resnets.0.conv_shortcut.bias",
    }
    for config, names in ((WAN_2_1, pairs), (WAN_2_2, nested)):
        ours = jax.eval_shape(lambda config=config: WanVAE(config, rngs=nnx.Rngs(0)))
        known = {stored_name(name, config) for name in named_leaves(ours)}
        assert len(known) == len(named_leaves(ours))
        for original, expected in names.items():
            assert diffusers_name(original, config) == expected
            assert expected in known
        assert {diffusers_name(name, config) for name in known} == known


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_is_used_once_and_has_its_place(version):
    given = tensors(version)
    ours = named_leaves(tiny(version))
    shapes = {
        stored_name(name, tiny(version).config): stored_shape(name, leaf.shape) for name, leaf in ours.items()
    }
    assert shapes == {name: tensor.shape for name, tensor in given.items()}


def test_tensors_of_another_model_are_listed():
    given = tensors("2_1")
    del given["encoder.conv_in.bias"], given["decoder.conv_in.bias"]
    given |= {"decoder.extra.weight": np.ones(3), "quant_conv.weight": np.ones((8, 8), np.float32)}
    with pytest.raises(UserError) as error:
        load_wan_vae(settings("2_1"), given)
    said = str(error.value)
    assert "2 missing: decoder.conv_in.bias, encoder.conv_in.bias;" in said
    assert "1 unknown: decoder.extra.weight;" in said
    assert "1 of another shape: quant_conv.weight (8×8, not 8×8×1×1×1)" in said
    with pytest.raises(UserError, match=r"\d+ missing: .*, …;"):
        load_wan_vae(settings("2_2"), tensors("2_1"))


def test_tensors_of_other_types_are_read_as_float32():
    import ml_dtypes

    given = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors("2_1").items()}
    for leaf in jax.tree.leaves(load_wan_vae(settings("2_1"), given)):
        assert leaf.dtype == jnp.float32 and (np.asarray(leaf) == 1).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"temporal_downsample": [False, True, True]},
            "temporal_downsample.*did you mean temperal_downsample",
        ),
        ({"_class_name": "AutoencoderKL"}, "class 'AutoencoderKL'"),
        ({"base_dim": 0}, "base_dim is 0"),
        ({"base_dim": "96"}, "base_dim"),
        ({"dim_mult": []}, "dim_mult"),
        ({"temperal_downsample": [True]}, "temperal_downsample has 1 values where 3"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values where 4"),
        ({"patch_size": 2}, "in_channels is 3.*make it 12"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16.*make it 8"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal is 8.*make it 4"),
        ({"is_residual": True, "dim_mult": [3, 2, 4, 7]}, "don't divide for the shortcuts"),
    ],
)
def test_a_config_that_can_not_be_used_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        WanVAEConfig.read(settings("2_1") | change)


def test_keys_that_say_nothing_of_the_shape_are_passed_over():
    more = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.42.1",
        "clip_output": False,
        "dropout": 0.0,
    }
    assert WanVAEConfig.read(settings("2_1") | more) == WanVAEConfig.read(settings("2_1"))
    assert WanVAEConfig.read({}) == WAN_2_1
    assert dataclasses.asdict(WanVAEConfig.read(settings("2_1")))["latents_mean"] == (0.1, -0.2, 0.3, 0.0)


@pytest.mark.parametrize(
    ("shape", "has_past", "says"),
    [
        ((1, 5, 12, 16, 3), False, "12×16 pixels.*8×8"),
        ((1, 4, 16, 16, 3), False, "4 frames.*1, 5, 9"),
        ((1, 0, 16, 16, 3), False, "0 frames"),
        ((1, 5, 16, 24, 3), True, "5 frames.*multiple of 4"),
    ],
)
def test_a_clip_off_the_grid_is_refused(shape, has_past, says):
    past = encode(tiny("2_1"), clip("2_1")[:, :1])[2] if has_past else None
    with pytest.raises(UserError, match=says):
        tiny("2_1").encode_chunk(np.zeros(shape, np.float32), past)


@pytest.mark.parametrize("shape", [(1, 0, 2, 2, 4), (1, 1, 2, 2, 16)])
def test_a_latent_of_another_autoencoder_is_refused(shape):
    with pytest.raises(UserError, match=f"{shape[1]} frames and {shape[-1]} channels"):
        tiny("2_1").decode(np.zeros(shape, np.float32))
