"""What an accelerator's default precision does to each program: what must be exact is, and the rest is near."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.low_precision import rounded, rounded_products
from helpers.sampling import tabulate
from helpers.tiny_batch import BATCH, NOISE, PLACES, SETTINGS, SIGMAS, make_dit
from helpers.tiny_dit import BATCH as TRAINED
from helpers.tiny_dit import CONFIG
from helpers.tiny_dit import make_dit as make_trained

from sora_jax.data.pipeline import PipelineConfig
from sora_jax.diffusion.guidance import Guidance
from sora_jax.diffusion.solvers import ODE_SOLVERS, State, solver_step
from sora_jax.evaluation import (
    abilities,
    extractors,
    frechet,
    intervals,
    metrics,
    optical_flow,
    report,
    statistics,
    summary,
    temporal,
)
from sora_jax.models import bert, layers
from sora_jax.models.dit import _pool
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.train.dit import DiTObjective, FlowConfig
from sora_jax.train.loop import make_steps
from sora_jax.train.optim import OptimConfig, newton_schulz, newton_schulz_gram, orthogonalise

TYPES = ("bfloat16", "tf32")
UNIT = {"bfloat16": 2.0**-8, "tf32": 2.0**-11}  # the largest relative error of a factor


def distance(one: Any, other: Any) -> float:
    """Of two trees, ‖one − other‖ / ‖other‖."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    ]
    norm = lambda arrays: np.sqrt(sum(np.sum(np.square(array)) for array in arrays))
    return float(norm([a - b for a, b in pairs]) / norm([b for _, b in pairs]))


def assert_exact(function: Any, *args: Any) -> None:
    """Nothing in it is rounded."""
    assert rounded_products(function, *args) == []


# The helper itself.


def _everywhere(x: jax.Array) -> jax.Array:
    """A product in each place that a product can hide in; every one is seen in the result."""
    square = jax.custom_vjp(lambda x: x @ x)
    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def bent(x):
        return x @ x

    bent.defjvp(lambda p, t: (bent(*p), t[0] @ p[0] + p[0] @ t[0]))
    x = jax.jit(lambda x: x @ x)(x) / 8
    x = jax.checkpoint(lambda x: square(x) / 8)(x)
    x = jax.lax.scan(lambda x, _: (bent(x) / 8, None), x, None, length=2)[0]
    x = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ s[1] / 8), (0, x))[1]
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ x / 8, lambda x: x, x)
    image = x[None, :, :, None]
    return jax.lax.conv_general_dilated(
        image, jnp.full((2, 2, 1, 1), 0.3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("to", TYPES)
def test_products_are_found_and_rounded_wherever_they_are(to):
    x = jnp.asarray(np.random.default_rng(0).random((4, 4), np.float32)) + 1
    assert len(rounded_products(_everywhere, x)) == 6
    exact = rounded(_everywhere, "float32")(x)
    np.testing.assert_allclose(exact, _everywhere(x), rtol=1e-6)
    assert UNIT[to] / 8 < distance(rounded(_everywhere, to)(x), exact) < 64 * UNIT[to]
    with jax.default_matmul_precision("highest"):
        assert_exact(lambda x: x @ x, x)
    by_hand = jax.lax.reduce_precision(x, 8, {"bfloat16": 7, "tf32": 10}[to])
    np.testing.assert_array_equal(rounded(lambda x: x @ x, to)(x), by_hand @ by_hand)


# The optimizer.


@pytest.mark.parametrize("to", ["float32", *TYPES])
@pytest.mark.parametrize("form", [orthogonalise, newton_schulz, newton_schulz_gram])
@pytest.mark.parametrize("shape", [(32, 192), (192, 32), (48, 48)])
@pytest.mark.parametrize("decades", [0, 5, 9])
def test_muons_step_is_right_at_every_precision(shape, decades, form, to):
    rng, q = np.random.default_rng(0), min(shape)
    left, right = (np.linalg.qr(rng.standard_normal((side, q)))[0] for side in shape)
    gradient = ((left * np.logspace(0, -decades, q)) @ right.T).astype(np.float32)
    if form is not orthogonalise:
        gradient = (gradient.T if shape[0] > shape[1] else gradient) / np.linalg.norm(gradient)
    singular = np.linalg.svd(rounded(form, to)(gradient), compute_uv=False)
    assert singular.max() < 1.25
    # Not far below: what is a thousandth of the gradient's norm is a direction still.
    assert singular[np.logspace(0, -decades, q) > 1e-2].min() > 0.5


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e36])
def test_muons_step_does_not_depend_on_the_gradients_size(size):
    matrix = np.random.default_rng(0).standard_normal((2, 6, 9)).astype(np.float32)
    np.testing.assert_allclose(
        orthogonalise(jnp.asarray(matrix * np.float32(size))), orthogonalise(jnp.asarray(matrix)), atol=1e-5
    )
    half = jnp.asarray(matrix, jnp.bfloat16)
    assert orthogonalise(half).dtype == jnp.float32
    np.testing.assert_allclose(orthogonalise(half), orthogonalise(half.astype(jnp.float32)))


def test_gradients_without_rank_give_steps_without_it():
    column, row = np.random.default_rng(0).standard_normal((2, 1, 8)).astype(np.float32)
    assert not np.asarray(orthogonalise(jnp.zeros((3, 8, 8)))).any()
    singular = np.linalg.svd(orthogonalise(jnp.asarray(column.T @ row)), compute_uv=False)
    assert 0.6 < singular[0] < 1.25 and singular[1:].max() < 1e-2


# The transformer: conditions, gathers and means are exact.


def test_gathers_by_products_are_exact(monkeypatch):
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 7)), jnp.float32)
    index = jnp.asarray(np.random.default_rng(1).integers(0, 5, (2, 11)))
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, 11, 7)), jnp.float32)
    gather = lambda table: layers.gather_conditions(table, index)
    np.testing.assert_array_equal(
        rounded(gather, "bfloat16")(table), np.take_along_axis(table, index[..., None], 1)
    )
    assert_exact(gather, table)
    assert_exact(jax.grad(lambda table: jnp.sum(gather(table) * weights)), table)


def test_conditions_are_exact():
    model = make_dit()
    assert model.config.pooled_text
    assert_exact(lambda sigma: model._conditions(sigma, jnp.asarray(BATCH.text), BATCH), SIGMAS[1])
    assert_exact(lambda words: _pool(words, jax.tree.map(jnp.asarray, BATCH)), jnp.asarray(BATCH.text))
    assert_exact(lambda coords: layers.rotary_angles(coords, 12, ((64.0, 0.25), (8.0, 0.125))), BATCH.coords)


# A training step.


@pytest.fixture(scope="module")
def gradients() -> dict[str, Any]:
    """((loss, metrics), gradient) of the transformer's objective at every precision."""
    objective = object.__new__(DiTObjective)  # of its loss alone: no data, no autoencoder
    objective.dit, objective.flow = CONFIG, FlowConfig(text_noise=0.1)
    objective.pipeline = PipelineConfig(max_segments=3)
    differentiate = jax.value_and_grad(objective.loss, has_aux=True)
    given = make_trained(), jax.tree.map(jnp.asarray, TRAINED), jax.random.key(1)
    return {to: rounded(differentiate, to)(*given) for to in ("float32", *TYPES)}


class Differentiated:
    """An objective whose batch is what the transformer's gives: the rest of a step is compiled by itself."""

    init = staticmethod(lambda key: make_trained())

    @staticmethod
    def loss(model: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        (loss, metrics), gradient = batch
        slopes = jax.tree.map(lambda x, g: jnp.sum(g * (x - jax.lax.stop_gradient(x))), model, gradient)
        return loss + sum(jax.tree.leaves(slopes)), metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_training_step_is_near_the_exact_one(name, gradients):
    init, step = make_steps(Differentiated, OptimConfig(name=name, lr=1e-3, warmup=0))
    state, key = init(jax.random.key(0)), jax.random.key(1)
    (exact, wanted), *others = (rounded(step, to)(state, gradients[to], key) for to in ("float32", *TYPES))
    moved = lambda after: jax.tree.map(jnp.subtract, after.params, state.params)
    for to, (after, figures) in zip(TYPES, others, strict=True):
        for figure in ("loss", "clean_error", "grad_norm"):
            assert figures[figure] == pytest.approx(wanted[figure], rel=8 * UNIT[to]), (to, figure)
        assert figures["learning_rate"] == wanted["learning_rate"]
        # AdamW's first step is the gradient's sign: a number near 0 may turn.
        assert 0 < distance(moved(after), moved(exact)) < np.sqrt(16 * UNIT[to])


# The sampler.


def _elementwise(x: jax.Array, batch: Any, sigma: jax.Array) -> jax.Array:
    """A model without products; words and sigmas matter."""
    words = (batch.text_segment_ids > 0).sum(1)[:, None, None]
    return jnp.sin(3 * x) + 0.1 * words + sigma.mean(1)[:, None, None]


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_samplers_own_arithmetic_is_exact(solver):
    guidance = tabulate(SETTINGS, PLACES, BATCH.condition_segment_ids)
    x = jnp.asarray(NOISE)
    state = State.begin(x, jnp.asarray(SIGMAS[0]))
    step = lambda state, batch, guidance: solver_step(
        jax.tree_util.Partial(_elementwise), state, batch, SIGMAS[1], SIGMAS[2], guidance, None, solver, 3
    )
    assert_exact(step, state, BATCH, guidance)


@pytest.mark.parametrize("to", TYPES)
def test_a_samplers_step_is_near_the_exact_one(to):
    x = jnp.asarray(NOISE)
    state = State.begin(x, jnp.asarray(SIGMAS[0]))
    tables = Guidance(text=3.0, conditioning=2.0, rescale=0.5).tables(BATCH.condition_segment_ids.shape)
    moved = lambda model: (
        solver_step(model, state, BATCH, SIGMAS[1], SIGMAS[2], tables, None, "euler", 3).x - x
    )
    # Guidance adds up the errors of three answers, each of a few roundings.
    assert 0 < distance(rounded(moved, to)(make_dit()), rounded(moved, "float32")(make_dit())) < 12 * UNIT[to]


# Other models.


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(
        VAEConfig(channels=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), decoder_blocks=(0, 1, 1)),
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("to", TYPES)
def test_the_autoencoder_is_near_the_exact_one(to, vae):
    clip = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 16, 3)), jnp.float32)
    latent = rounded(VAE.encode, "float32")(vae, clip)
    assert 0 < distance(rounded(VAE.encode, to)(vae, clip)[0], latent[0]) < 4 * UNIT[to]
    there = [rounded(VAE.decode, each)(vae, latent[0]) for each in (to, "float32")]
    assert 0 < distance(*there) < 4 * UNIT[to]
    from sora_jax.models.vae import haar

    assert_exact(haar, jnp.ones((1, 1, 2, 2, 24)))


def test_the_text_encoder_is_exact():
    settings = {
        "vocab_size": 9,
        "max_position_embeddings": 8,
        "type_vocab_size": 2,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
    }
    model = bert.Bert(settings, jax.random.key(0))
    assert_exact(model, jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool))


def test_metrics_are_exact():
    """SSIM, optical flow, the error after warping and features: an accelerator rounds nothing in them."""
    frames, flow = jnp.ones((2, 32, 32, 3)), jnp.ones((2, 32, 32, 2))
    assert_exact(lambda a, b: metrics._block_similarity(a, b, 255.0, 2, "valid"), frames, frames)
    assert_exact(optical_flow._block_flow, frames, frames)
    assert_exact(temporal._block_error, frames, frames, flow, flow)
    for name in ("random-image", "random-video"):
        extractor = extractors.EXTRACTORS[name](None)
        assert_exact(extractor.prepare, frames)
        prepared = extractor.prepare(frames)
        assert_exact(
            extractor.network, extractor.weights, prepared if extractor.kind == "image" else prepared[None]
        )


def test_distances_intervals_and_reports_are_numpys():
    """They compute in float64 on the host: no accelerator has a part in them."""
    for module in (abilities, frechet, intervals, report, statistics, summary):
        text = pathlib.Path(module.__file__).read_text()
        assert "jnp" not in text and "jax.numpy" not in text, module.__name__
