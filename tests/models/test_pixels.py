"""Pixels as latents: exact both ways, in groups as a learned autoencoder's, without files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.checkpoints.bundle import load_bundle, measure_latents, save_bundle
from sora_jax.checkpoints.components import Bundle
from sora_jax.errors import UserError
from sora_jax.models.pixels import PIXELS, PixelVAE
from sora_jax.models.tiles import Tiles, decode_stream, encode_stream
from sora_jax.models.vae import VAE, VAEConfig, decoding_flops


def noise(frames: int = 9, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)


@pytest.mark.parametrize("name, channels", [("pixels", 12), ("grey", 4)])
def test_a_clip_comes_back_as_it_was(name, channels):
    vae, clip = load_bundle(name).vae, noise()
    if name == "grey":
        clip = np.repeat(clip[..., :1], 3, axis=-1)
    vae = measure_latents(vae, [clip])
    assert not jax.tree.leaves(vae)
    latent = np.concatenate(list(encode_stream(vae, clip)))
    assert latent.shape == (3, 16, 16, channels)
    # As the transformer sees them: mean 0 and deviation 1.
    np.testing.assert_allclose(latent.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(latent.std((0, 1, 2)), 1, atol=1e-4)
    frames = np.concatenate(list(decode_stream(vae, latent)))
    np.testing.assert_allclose((frames + 1) * 127.5, clip, atol=1e-3)


def test_a_group_holds_its_own_frames_and_the_first_one_its_own_four_times():
    vae, clip = load_bundle("pixels").vae, jnp.asarray(noise(5), jnp.float32)[None]
    latent, log_variance = vae.encode(clip)
    np.testing.assert_array_equal(
        latent[0, 0].reshape(16, 16, 4, 3), np.repeat(clip[0, 0][..., None, :], 4, -2)
    )
    np.testing.assert_array_equal(
        latent[0, 1].reshape(16, 16, 4, 3), np.moveaxis(np.asarray(clip[0, 1:]), 0, -2)
    )
    assert (log_variance == -20).all()
    with pytest.raises(UserError, match="can't be encoded"):
        vae.encode(clip[:, :4])


def test_tiles_are_the_whole():
    vae, clip = load_bundle("pixels").vae, noise(9, 40)
    tiles = Tiles(size=24, halo=2, blend=2)
    whole, cut = (np.concatenate(list(encode_stream(vae, clip, of))) for of in (Tiles(), tiles))
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_it_is_stored_without_weights(tmp_path):
    vae = measure_latents(load_bundle("grey").vae, [noise()])
    save_bundle(Bundle("own", vae), tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["config.json"]
    again = load_bundle(tmp_path / "own").vae
    assert isinstance(again, PixelVAE) and again.config == vae.config


def test_cells_must_hold_their_pixels():
    with pytest.raises(UserError, match="set 12 \\(colour\\) or 4 \\(grey\\)"):
        VAEConfig(kind="pixels", strides=((4, 1, 1),), channels=16)
    wide = VAEConfig(kind="pixels", strides=((4, 2, 2),), channels=48)
    assert wide.compression == (4, 2, 2) and decoding_flops(wide, 1, 5, 8, 8) == 0


def test_identities_of_learned_ones_are_what_they_were():
    assert "kind" not in repr(VAEConfig())
    assert type(load_bundle("toyworld").vae) is VAE
    assert all(isinstance(load_bundle(name).vae, VAE) for name in PIXELS)
    assert PixelVAE(PIXELS["grey"], rngs=nnx.Rngs(0)).config.channels == 4
