"""LTX-Video's autoencoders: diffusers' numbers, the same as a stream and as a whole, and nothing dropped in silence."""

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
from ltx_vae_check import check, decode, encode, model_of

from sora_jax.checkpoints.ltx_vae_weights import diffusers_names, load_ltx_vae, stored_name, stored_shape
from sora_jax.checkpoints.store import named_leaves
from sora_jax.errors import UserError
from sora_jax.models.decode_windows import Windows
from sora_jax.models.ltx_layers import fold, unfold
from sora_jax.models.ltx_vae import LTXVAE, add_noise
from sora_jax.models.ltx_vae_config import LTX_0_9_0, LTX_0_9_1, LTX_0_9_5, LTXVAEConfig
from sora_jax.models.tiles import Tiles, decode_stream, encode_stream

ROOT = pathlib.Path(__file__).parents[2]

VERSIONS = ("0_9_0", "0_9_1", "0_9_5", "causal")
PUBLISHED = {"0_9_0": LTX_0_9_0, "0_9_1": LTX_0_9_1, "0_9_5": LTX_0_9_5}
decode_chunk = jax.jit(LTXVAE.decode_chunk)
decode_window = jax.jit(LTXVAE.decode)


@functools.cache
def golden(version: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / f"ltx_vae_tiny_{version}.npz") as file:
        return dict(file)


@functools.cache
def tiny(version: str) -> LTXVAE:
    return model_of(golden(version))


@functools.cache
def settings(version: str) -> dict:
    return json.loads(str(golden(version)["config"]))


def tensors(version: str) -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in json.loads(str(golden(version)["names"]))}


def clip(version: str) -> np.ndarray:
    return golden(version)["frames"][None] / np.float32(127.5) - 1


@pytest.mark.parametrize("version", rest_slow(VERSIONS))
def test_it_computes_what_diffusers_computes(version):
    """With a timestep and with the noise in its layers, where it takes them."""
    errors = check(golden(version))
    assert len(errors) == (3 if version == "causal" else 6)
    assert max(errors.values()) <= 1e-4, errors


def test_bfloat16_is_no_further_off_than_diffusers_own():
    own = golden("0_9_1")
    model = model_of(own, "bfloat16")
    ours = encode(model, clip("0_9_1"))[0], decode(model, own["latent"][None])
    for coded, name, bound in zip(ours, ("mean_9", "clip_9"), own["bfloat16"], strict=True):
        error = np.sqrt(np.mean(np.square(coded[0] - own[name]))) / own[name].std()
        assert 1e-3 < error < 1.2 * bound


@pytest.mark.parametrize("version", ["0_9_0", "causal"])  # both ways of downsampling
def test_a_stream_is_encoded_as_the_whole(version):
    model, frames, past, parts, start = tiny(version), clip(version), None, [], 0
    for count in (1,) * golden(version)["latent"].shape[0]:  # latent frames
        begin, end = max(8 * start - 7, 0), 8 * (start + count) - 7
        *coded, past = encode(model, frames[:, begin:end], past)
        parts, start = [*parts, coded], start + count
    for chunks, whole in zip(zip(*parts, strict=True), encode(model, frames)[:2], strict=True):
        np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, atol=1e-5)


def test_a_causal_decoder_decodes_a_stream_as_the_whole():
    model, latent = tiny("causal"), golden("causal")["latent"][None]
    whole = np.asarray(jax.jit(LTXVAE.decode)(model, latent))
    first, past = decode_chunk(model, latent[:, :1])
    rest, _ = decode_chunk(model, latent[:, 1:], past)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-5)
    assert first.shape[1] == 1


def test_a_decoder_that_sees_later_frames_takes_no_chunks():
    model, latent = tiny("0_9_5"), golden("0_9_5")["latent"]
    with pytest.raises(UserError, match="decoder sees later frames.*`decode`"):
        model.decode_chunk(latent[None, :1])
    changed = latent[None].copy()
    changed[:, 1] += 1
    moved = np.abs(decode(model, changed) - decode(model, latent[None])).max(axis=(0, 2, 3, 4))
    assert moved[0] > 1e-3  # it does see them


@pytest.mark.parametrize("count", [16, 17])
def test_windows_that_overlap_enough_are_the_whole(count, monkeypatch):
    model = plain("0_9_5", decode_noise=0.0)
    assert model.config.reach == 7
    assert [config.reach for config in PUBLISHED.values()] == [24, 31, 22]
    latent = np.random.default_rng(0).standard_normal((count, 1, 1, 8)).astype(np.float32)
    whole = np.clip(decode_window(model, latent[None], None)[0], -1, 1)
    off = []
    for overlap in (model.config.reach, 0):
        monkeypatch.setattr(LTXVAE, "windows", property(lambda self, own=overlap: Windows(2, own)))
        clip = np.concatenate(list(decode_stream(model, iter(latent))))
        assert clip.shape == whole.shape
        off.append(np.abs(clip - whole).max())
    assert off[0] < 1e-5 < 1e-2 < off[1]


def test_noise_is_added_before_decoding_and_is_the_same_each_time():
    """Of the models that take a timestep: the same video however it is read, and that of the clip alone."""
    loud, quiet = plain("0_9_5"), plain("0_9_5", decode_noise=0.0)
    assert (loud.config.decode_timestep, loud.config.decode_noise) == (0.05, 0.025)
    latent = golden("0_9_5")["latent"]
    frames = [np.concatenate(list(decode_stream(loud, latent))) for _ in range(2)]
    np.testing.assert_array_equal(*frames)
    noise = np.random.default_rng(0)
    given = np.stack([add_noise(one, noise.standard_normal(one.shape, np.float32)) for one in latent])
    expected = np.clip(decode_window(loud, given[None], 0.05)[0], -1, 1)
    np.testing.assert_allclose(frames[0], expected, atol=1e-5)
    assert np.abs(frames[0] - np.concatenate(list(decode_stream(quiet, latent)))).max() > 1e-3
    np.testing.assert_array_equal(list(plain("0_9_0").raw_latents(latent)), latent)


def plain(version: str, **fields: float) -> LTXVAE:
    """A model whose latents are raw ones."""
    model = model_of(golden(version))
    model.config = dataclasses.replace(model.config, latents_mean=(), latents_std=(), **fields)
    return model


def test_the_encoder_sees_nothing_that_comes_later():
    model, frames = tiny("0_9_5"), clip("0_9_5")
    mean = encode(model, frames)[0]
    for frame in (1, 8):
        changed = frames.copy()
        changed[:, frame] *= -1
        shown = np.abs(encode(model, changed)[0] - mean).max(axis=(0, 2, 3, 4))
        assert shown[0] < 1e-6 and shown[1] > 1e-3


def test_timestep_and_noise_change_what_is_decoded():
    model, latent = tiny("0_9_1"), golden("0_9_1")["latent"][None, :1]
    run = jax.jit(lambda model, latent, time: model.decode(latent, time))
    base = np.asarray(run(model, latent, 300.0))
    both = run(model, np.concatenate([latent, latent]), np.float32([300.0, 40.0]))
    np.testing.assert_allclose(both[:1], base, atol=1e-5)
    assert np.abs(both[1] - base[0]).max() > 1e-2
    noisy = jax.jit(lambda m, z: m.decode(z, 300.0, lambda high, wide: jnp.ones((high, wide))))(model, latent)
    assert np.abs(noisy - base).max() > 1e-2
    np.testing.assert_allclose(add_noise(np.ones(2), np.zeros(2)), 0.975)


def test_frames_are_encoded_tile_by_tile_and_normalised():
    own = golden("0_9_0")
    model = tiny("0_9_0")
    statistics = {"latents_mean": (0.5,) * 8, "latents_std": (2.0,) * 8, "scaling_factor": 4.0}
    config = dataclasses.replace(model.config, **statistics)
    graph, state = nnx.split(model)
    del graph
    scaled = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: LTXVAE(config, rngs=nnx.Rngs(0)))), state)
    coded = np.concatenate(list(encode_stream(scaled, own["frames"], Tiles(8, 1, 1, 1))))
    np.testing.assert_allclose(coded, (own["mean_9"] - 0.5) * 4 / 2, atol=1e-4)
    assert jax.eval_shape(LTXVAE.to_latent, scaled, clip("0_9_0")).shape == (1, *own["mean_9"].shape)


@pytest.mark.slow  # compiling it takes a minute
def test_there_is_a_gradient_of_every_parameter():
    def loss(model: LTXVAE, frames: jax.Array, latents: jax.Array) -> jax.Array:
        mean, logvar = model.encode(frames)
        noise = lambda high, wide: jnp.ones((high, wide))
        return jnp.mean(mean**2) + jnp.mean(logvar**2) + jnp.mean(model.decode(latents, 300.0, noise) ** 2)

    given = tiny("0_9_1"), clip("0_9_1"), golden("0_9_1")["latent"][None]
    for name, gradient in named_leaves(jax.jit(jax.grad(loss))(*given)).items():
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_folding_has_the_originals_order_and_can_be_undone():
    x = np.arange(2 * 4 * 2 * 6 * 3).reshape(2, 4, 2, 6, 3)
    folded = fold(jnp.asarray(x), (2, 1, 2))
    assert folded.shape == (2, 2, 2, 3, 12)
    np.testing.assert_array_equal(
        folded[1, 1, 0, 2].reshape(3, 2, 2), x[1, 2:, 0, 4:].transpose(2, 0, 1)
    )  # (C, T, X)
    np.testing.assert_array_equal(unfold(folded, (2, 1, 2)), x)


@pytest.mark.parametrize(("version", "millions"), [("0_9_0", 419), ("0_9_1", 935), ("0_9_5", 1247)])
def test_the_published_shapes(version, millions):
    config = PUBLISHED[version]
    model = jax.eval_shape(lambda: LTXVAE(config, rngs=nnx.Rngs(0)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(model)) / 1e6) == millions
    assert config.compression == (8, 32, 32) and config.channels == 128
    mean, logvar = jax.eval_shape(LTXVAE.encode, model, jnp.zeros((1, 9, 64, 96, 3)))
    assert mean.shape == logvar.shape == (1, 2, 2, 3, 128)
    back = jax.eval_shape(lambda m, z: m.decode(z), model, mean)
    assert back.shape == (1, 9, 64, 96, 3) and back.dtype == jnp.float32


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_is_used_once_and_has_its_place(version):
    shapes = {
        stored_name(name): stored_shape(name, leaf.shape)
        for name, leaf in named_leaves(tiny(version)).items()
    }
    shapes |= dict.fromkeys(("latents_mean", "latents_std"), (8,))
    assert shapes == {name: tensor.shape for name, tensor in tensors(version).items()}


def test_the_originals_names_are_known():
    """As in ltx-video-2b-v0.9, -v0.9.1 and -v0.9.5 (read from diffusers' conversion)."""
    pairs = {
        "0_9_0": {
            "encoder.down_blocks.1.conv.weight": "encoder.down_blocks.0.downsamplers.0.conv.weight",
            "encoder.down_blocks.2.norm3.norm.bias": "encoder.down_blocks.0.conv_out.norm3.bias",
            "encoder.down_blocks.5.conv_shortcut.weight": "encoder.down_blocks.1.conv_out.conv_shortcut.conv.weight",
            "encoder.down_blocks.8.res_blocks.2.conv1.conv.weight": "encoder.down_blocks.3.resnets.2.conv1.conv.weight",
            "encoder.down_blocks.9.res_blocks.0.conv2.conv.bias": "encoder.mid_block.resnets.0.conv2.conv.bias",
            "decoder.up_blocks.0.res_blocks.3.conv1.conv.bias": "decoder.mid_block.resnets.3.conv1.conv.bias",
            "decoder.up_blocks.2.conv.conv.weight": "decoder.up_blocks.1.upsamplers.0.conv.conv.weight",
            "decoder.up_blocks.4.conv1.conv.weight": "decoder.up_blocks.2.conv_in.conv1.conv.weight",
            "decoder.up_blocks.9.res_blocks.0.conv1.conv.bias": "decoder.up_blocks.3.resnets.0.conv1.conv.bias",
            "per_channel_statistics.mean-of-means": "latents_mean",
        },
        "0_9_1": {
            "decoder.up_blocks.0.time_embedder.timestep_embedder.linear_1.weight": (
                "decoder.mid_block.time_embedder.timestep_embedder.linear_1.weight"
            ),
            "decoder.up_blocks.3.conv.conv.bias": "decoder.up_blocks.1.upsamplers.0.conv.conv.bias",
            "decoder.up_blocks.6.res_blocks.4.per_channel_scale2": "decoder.up_blocks.2.resnets.4.per_channel_scale2",
            "decoder.last_time_embedder.timestep_embedder.linear_2.bias": (
                "decoder.time_embedder.timestep_embedder.linear_2.bias"
            ),
            "decoder.last_scale_shift_table": "decoder.scale_shift_table",
            "decoder.timestep_scale_multiplier": "decoder.timestep_scale_multiplier",
        },
        "0_9_5": {
            "encoder.down_blocks.3.conv.conv.weight": "encoder.down_blocks.1.downsamplers.0.conv.conv.weight",
            "encoder.down_blocks.6.res_blocks.1.conv1.conv.bias": "encoder.down_blocks.3.resnets.1.conv1.conv.bias",
            "encoder.down_blocks.8.res_blocks.1.conv1.conv.bias": "encoder.mid_block.resnets.1.conv1.conv.bias",
            "per_channel_statistics.std-of-means": "latents_std",
        },
    }
    for version, names in pairs.items():
        config = PUBLISHED[version]
        ours = jax.eval_shape(lambda config=config: LTXVAE(config, rngs=nnx.Rngs(0)))
        known = {stored_name(name) for name in named_leaves(ours)} | {"latents_mean", "latents_std"}
        left_out = {"model.diffusion_model.proj_in.weight": 0, "vae.per_channel_statistics.channel": 0}
        given = {f"vae.{name}": 0 for name in names} | left_out
        assert diffusers_names(given, config) == {known: f"vae.{old}" for old, known in names.items()}
        assert set(names.values()) <= known
        assert diffusers_names(dict.fromkeys(known, 0), config) == {name: name for name in known}


def test_tensors_of_another_model_are_listed():
    given = tensors("0_9_0")
    del given["encoder.conv_in.conv.bias"]
    given |= {"decoder.extra.weight": np.ones(3), "latents_mean": np.ones(3, np.float32)}
    with pytest.raises(UserError) as error:
        load_ltx_vae(settings("0_9_0"), given)
    said = str(error.value)
    assert "1 missing: encoder.conv_in.conv.bias;" in said
    assert "1 unknown: decoder.extra.weight;" in said
    assert "1 of another shape: latents_mean (3, not 8)" in said
    with pytest.raises(UserError, match=r"\d+ missing: .*, …;"):
        load_ltx_vae(settings("0_9_5"), tensors("0_9_0"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder_causall": True}, "decoder_causall.*did you mean decoder_causal"),
        ({"_class_name": "AutoencoderKLWan"}, "class 'AutoencoderKLWan'"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"patch_size_t": 2}, "patch_size_t is 2, and only 1"),
        ({"block_out_channels": []}, "one or more stages"),
        ({"layers_per_block": [1, 1]}, "layers_per_block has 2 values where 5"),
        ({"decoder_inject_noise": [True] * 4}, "decoder_inject_noise has 4 values where 5"),
        ({"down_block_types": ["Other"] * 4}, "down_block_types has 'Other'"),
        ({"downsample_type": ["fast"] * 4}, "downsample_type has 'fast'"),
        ({"upsample_factor": [2, 2, 2, 3]}, "upsample_factor"),
        ({"timestep_conditioning": True}, "can't have a timestep"),
        ({"spatial_compression_ratio": 32}, "spatial_compression_ratio is 32, and the other keys make it 16"),
        ({"decoder_spatio_temporal_scaling": [True] * 4}, "16 of 32×32"),
        ({"spatio_temporal_scaling": [True] * 4}, "16 frames of 32×32"),
    ],
)
def test_a_config_that_can_not_be_used_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        LTXVAEConfig.read(settings("0_9_0") | change)


def test_widths_that_can_not_be_folded_are_refused():
    with pytest.raises(UserError, match="width of 8 can't be folded into one of 10"):
        LTXVAEConfig.read(settings("0_9_5") | {"block_out_channels": [8, 10, 16, 16, 32]})


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 9, 40, 64, 3), "40×64 pixels.*16×16"),
        ((1, 8, 16, 16, 3), "8 frames.*1, 9, 17"),
        ((1, 0, 16, 16, 3), "0 frames"),
    ],
)
def test_a_clip_off_the_grid_is_refused(shape, says):
    with pytest.raises(UserError, match=says):
        tiny("0_9_0").encode(np.zeros(shape, np.float32))


def test_a_latent_or_a_timestep_of_another_autoencoder_is_refused():
    with pytest.raises(UserError, match="1 frames and 4 channels"):
        tiny("0_9_0").decode(np.zeros((1, 1, 2, 2, 4), np.float32))
    with pytest.raises(UserError, match="takes no timestep"):
        tiny("0_9_0").decode(np.zeros((1, 1, 2, 2, 8), np.float32), 0.05)
