"""A wrong shape at a public boundary is an error in tests, in the alphabet of `sora_jax.axes`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.shape_checks import BOUNDARIES
from helpers.tiny_batch import BATCH
from helpers.tiny_dit import make_dit
from jaxtyping import TypeCheckError

from sora_jax.diffusion.flow import gather_sigmas
from sora_jax.models.attention.dispatch import attend
from sora_jax.models.layers import rotate
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.tokens.patches import patchify, reference_patches, unpatchify

B, N, H, F = 2, 4, 1, 4


def vae() -> VAE:
    return VAE(VAEConfig(channels=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8)), rngs=nnx.Rngs(0))


def shaped(function, *shapes):
    """Traces `function` on arrays of these shapes: nothing is computed."""
    return jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


WRONG = {
    "patchify": lambda: patchify(np.zeros((1, 2, 2)), (1, 1, 1)),
    "unpatchify": lambda: unpatchify(np.zeros((1, 4, 2)), (1, 2, 2), (1, 1, 1)),
    "reference_patches": lambda: reference_patches(np.zeros((2, 3, 4)), np.zeros((3, 2)), np.zeros(2)),
    "gather_sigmas": lambda: gather_sigmas(jnp.zeros((B, 3)), jnp.zeros((B + 1, N), int)),
    "rotate": lambda: rotate(jnp.zeros((B, N, F)), (jnp.zeros((B, N, F // 2)),) * 2),
    "attend": lambda: attend(
        *[jnp.zeros((B, N, H, F))] * 2, jnp.zeros((B, N, H, F + 1)), jnp.ones((B, N), int)
    ),
    "VAE.encode": lambda: shaped(vae().encode, (5, 16, 16, 3)),
    "VAE.decode": lambda: shaped(vae().decode, (2, 2, 2, 4)),
    "VAE.encode_chunk": lambda: shaped(vae().encode_chunk, (5, 16, 16, 3)),
    "VAE.decode_chunk": lambda: shaped(vae().decode_chunk, (2, 2, 2, 4)),
    "VAE.to_latent": lambda: shaped(vae().to_latent, (5, 16, 16, 3)),
    "DiT.__call__": lambda: make_dit()(BATCH.patches, BATCH, jnp.zeros(3)),
}


@pytest.mark.parametrize("name", [name for names in BOUNDARIES.values() for name in names])
def test_a_wrong_shape_is_caught(name):
    with pytest.raises(TypeCheckError, match="parameters"):
        WRONG[name]()
