"""The autoencoder's loss: what is added for latents that are easy to learn, on a model that codes nothing away."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_model import TINY_VAE
from ml_collections import ConfigDict

from sora_jax.errors import UserError
from sora_jax.train.objectives import complete, make_objective
from sora_jax.train.vae import VAEObjective

SIDE = 32
CLIPS = np.random.default_rng(0).integers(0, 256, (4, 5, SIDE, SIDE, 3), np.uint8)


@dataclasses.dataclass
class Identity:
    """Latents are pixels; what is decoded at half the size is off by `bias`. Keeps what it was given to decode."""

    bias: float = 0.0
    given: list[jax.Array] = dataclasses.field(default_factory=list)

    def encode(self, clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        return clip, jnp.full(clip.shape, -60.0)

    def decode(self, latent: jax.Array) -> jax.Array:
        self.given.append(latent)
        return latent + self.bias * (latent.shape[2] < SIDE)


def make(tmp_path, crop=(5, SIDE, SIDE), **loss) -> VAEObjective:
    config = {
        "objective": "vae",
        "steps": 1,
        "vae": TINY_VAE,
        "loss": {"crop": crop, **loss},
        "data": {"source": "toyworld"},
    }
    return make_objective(complete(ConfigDict(config)), tmp_path)


def loss_of(objective: VAEObjective, model: Identity) -> tuple[float, dict[str, float]]:
    loss, metrics = objective.loss(model, {"clip": jnp.asarray(CLIPS)}, jax.random.key(0))
    return float(loss), {name: float(value) for name, value in metrics.items()}


def test_equivariance_adds_the_loss_of_clips_half_as_large(tmp_path):
    plain, plain_metrics = loss_of(make(tmp_path), Identity(bias=0.1))
    model = Identity(bias=0.1)
    loss, metrics = loss_of(make(tmp_path, equivariance=0.5, absolute=2.0, squared=3.0), model)
    assert loss - plain == pytest.approx(0.5 * (2.0 * 0.1 + 3.0 * 0.01), rel=1e-3)
    assert metrics["psnr_half"] == pytest.approx(10 * np.log10(4 / 0.01), rel=1e-3)
    assert "psnr_half" not in plain_metrics
    small = CLIPS.reshape(4, 5, SIDE // 2, 2, SIDE // 2, 2, 3).mean((3, 5)) / 127.5 - 1
    np.testing.assert_allclose(model.given[1], small, atol=1e-5)


def test_noise_on_latents_has_a_level_of_its_own_for_each_clip(tmp_path):
    model = Identity()
    _, metrics = loss_of(make(tmp_path, latent_noise=0.5), model)
    noise = np.asarray(model.given[0]) - (CLIPS / 127.5 - 1)
    levels = noise.std((1, 2, 3, 4))
    assert levels.min() > 0 and levels.max() < 0.5 and np.ptp(levels) > 0.05
    assert metrics["psnr"] == pytest.approx(10 * np.log10(4 / np.square(noise).mean()), rel=1e-3)
    clean = Identity()
    loss_of(make(tmp_path), clean)
    np.testing.assert_allclose(clean.given[0], CLIPS / 127.5 - 1, atol=1e-5)


def test_what_cannot_be_halved_and_weights_below_zero_are_refused(tmp_path):
    _, height, width = make(tmp_path).vae.compression
    with pytest.raises(UserError, match=f"multiples of {2 * height} and {2 * width}"):
        make(tmp_path, crop=(5, 3 * height, 4 * width), equivariance=0.5)
    make(tmp_path, crop=(5, 3 * height, 4 * width))
    for name in ("equivariance", "latent_noise"):
        with pytest.raises(UserError, match=name):
            make(tmp_path, **{name: -0.1})
