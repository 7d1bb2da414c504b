"""Guidance that a model learns by itself is classifier-free guidance of the scale that was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_dit import BATCH, K
from helpers.tiny_run import tiny_config

from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.train.dit import DiTObjective, FlowConfig

KEY = jax.random.key(5)
GENERATED = (BATCH.segment_ids > 0) & ~np.asarray(BATCH.conditioning_mask)
CAPTIONED = np.stack([np.isin(ids, own) for ids, own in zip(BATCH.segment_ids, BATCH.text_segment_ids)])
CAPTIONED &= BATCH.segment_ids > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constants:
    """Predicts one number for tokens whose segment has a caption, another for the rest."""

    captioned: jax.Array
    uncaptioned: jax.Array

    def __call__(self, patches, batch, sigma):
        has = (batch.segment_ids[:, :, None] == batch.text_segment_ids[:, None, :]).any(-1, keepdims=True)
        return jnp.where(has, self.captioned, self.uncaptioned) * jnp.ones_like(patches)


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_guidance")

    def make(**changes):
        config = tiny_config(folder, 1)
        config.pipeline.max_segments = K
        config.flow.update({"text_dropout": 0.0, "text_noise": 0.0} | changes)
        return DiTObjective(config, folder / "run")

    return make


def gradient(objective, model):
    return jax.grad(lambda model: objective.loss(model, BATCH, KEY)[0])(model)


def mean_velocity(tokens):
    noise = jax.random.normal(jax.random.split(KEY, 4)[1], BATCH.patches.shape)
    return float(jnp.mean(flow.velocity(BATCH.patches, noise)[np.nonzero(tokens & GENERATED)]))


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_what_it_learns_is_the_guided_velocity_of_that_scale(objective, scale):
    assert CAPTIONED.any() and (GENERATED & ~CAPTIONED).any()
    plain, uncaptioned = mean_velocity(CAPTIONED), 0.2
    guided = uncaptioned + scale * (plain - uncaptioned)
    at = lambda value: gradient(
        objective(self_guidance=scale), Constants(jnp.float32(value), jnp.float32(uncaptioned))
    )
    assert abs(float(at(guided).captioned)) < 1e-5
    assert float(at(guided - 0.1).captioned) < -1e-3 and float(at(guided + 0.1).captioned) > 1e-3


def test_segments_without_a_caption_learn_the_plain_velocity(objective):
    """Those whose caption is dropped too; and nothing is learned through the prediction that guides."""
    one, other = Constants(jnp.float32(0.7), jnp.float32(0.2)), Constants(jnp.float32(9.0), jnp.float32(0.2))
    guided, plain = objective(self_guidance=3.0), objective()
    assert gradient(guided, one).uncaptioned == gradient(guided, other).uncaptioned
    assert gradient(guided, one).uncaptioned == pytest.approx(
        float(gradient(plain, one).uncaptioned), rel=1e-5
    )
    assert gradient(guided, one).captioned != pytest.approx(float(gradient(plain, one).captioned), rel=0.1)
    dropped = {"text_dropout": 1.0}
    losses = [
        float(objective(**dropped, **own).loss(one, BATCH, KEY)[0]) for own in ({}, {"self_guidance": 3.0})
    ]
    assert losses[0] == losses[1]


def test_up_to_a_sigma_the_velocity_is_plain(objective):
    model = Constants(jnp.float32(0.7), jnp.float32(0.2))
    loss = lambda **own: float(objective(**own).loss(model, BATCH, KEY)[0])
    plain, everywhere = loss(), loss(self_guidance=3.0)
    assert loss(self_guidance=3.0, self_guidance_low=1.0) == plain
    assert len({plain, everywhere, loss(self_guidance=3.0, self_guidance_low=0.6)}) == 3


def test_such_a_run_is_sampled_without_guidance(objective):
    guidance = lambda **own: objective(**own).bundle("run", None).sampling.guidance
    assert (guidance(), guidance(self_guidance=3.0)) == (3.0, 1.0)


def test_scales_below_one_are_refused():
    with pytest.raises(UserError, match=r"config\.flow\.self_guidance=0\.5 must be at least 1"):
        FlowConfig(self_guidance=0.5)
