"""LTX-Video's transformer against diffusers (golden arrays of tools/parity/ltx.py), and packed against alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusers_folder import golden
from helpers.parity import draw_all, relative_error
from ltx_check import run, segment, sigmas, velocity

from sora_jax.checkpoints.store import named_leaves
from sora_jax.errors import UserError
from sora_jax.models.ltx import LTX, LTXConfig, rotary_angles
from sora_jax.models.ltx_weights import PUBLISHED_LTX, diffusers_names, ltx_config, published_shapes
from sora_jax.tokens.packing import PackedBatch, pack_batch, unpack
from sora_jax.tokens.patches import coordinates

GOLDEN = golden("ltx_tiny")
NAMES, SETTINGS = GOLDEN["names"], GOLDEN["config"]
CONFIG = ltx_config(SETTINGS)


@pytest.fixture(scope="module")
def model() -> LTX:
    return PUBLISHED_LTX.load(CONFIG, draw_all(NAMES))


def test_velocities_are_those_of_diffusers(model):
    """As LTXPipeline calls it, and as LTXConditionPipeline: a timestep a token, other times of frames."""
    assert relative_error(run(model, GOLDEN), GOLDEN["velocity"]) < 1e-4
    config = dataclasses.replace(CONFIG, conditional=True)
    other = PUBLISHED_LTX.load(config, draw_all(NAMES))
    assert relative_error(run(other, GOLDEN, given=1, fps=24.0), GOLDEN["velocity_by_token"]) < 1e-4


def test_bfloat16_is_as_near_as_pytorchs_own():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = PUBLISHED_LTX.load(config, draw_all(NAMES), dtype=jnp.bfloat16)
    theirs = relative_error(GOLDEN["velocity_bfloat16"], GOLDEN["velocity"])
    assert 0 < relative_error(run(rounded, GOLDEN), GOLDEN["velocity"]) < 1.5 * theirs


@pytest.mark.slow
def test_packed_is_alone_forward_and_gradient(model):
    generator = np.random.default_rng(3)
    shapes, words = [(3, 2, 3), (1, 4, 4), (2, 3, 2)], [5, 0, 9]
    segments = [
        segment(
            generator.standard_normal((*shape, 8), np.float32),
            generator.standard_normal((count, 16), np.float32),
            given=int(shape[0] > 2),
        )
        for shape, count in zip(shapes, words, strict=True)
    ]
    weights = [generator.standard_normal(one.patches.shape).astype(np.float32) for one in segments]

    @jax.jit
    def loss(model: LTX, batch: PackedBatch, sigma: np.ndarray, weight: np.ndarray) -> jax.Array:
        return (model(batch.patches, batch, sigma) * weight).sum()

    def evaluate(members: list[int]):
        batch, places = pack_batch([[segments[i] for i in members]], 1, 48, 24, 8)
        weight = np.zeros_like(batch.patches)
        for place, i in zip(places, members, strict=True):
            weight[0, place.start : place.start + place.length] = weights[i]
        sigma = sigmas(batch, 0.6)
        gradient = jax.grad(loss)(model, batch, sigma, weight)
        return unpack(velocity(model, batch, sigma), places), jax.tree.leaves(gradient)

    velocity.clear_cache()
    together, gradient = evaluate([0, 1, 2])
    alone = [evaluate([i]) for i in range(3)]
    for i, (own,) in enumerate(one for one, _ in alone):
        np.testing.assert_allclose(together[i], own, atol=1e-5)
    for whole, *parts in zip(gradient, *(leaves for _, leaves in alone), strict=True):
        np.testing.assert_allclose(whole, sum(parts), atol=1e-5 * max(1.0, float(np.abs(whole).max())))
    assert velocity._cache_size() == 1  # for all shapes


@pytest.mark.parametrize(("fps", "first"), [(24.0, False), (25.0, True), (30.0, True)])
def test_positions_are_seconds_and_pixels(fps, first):
    """The angles of the lowest and highest frequency, π/2 and 10⁴ π/2, over twenty seconds and 2048 pixels."""
    config = dataclasses.replace(CONFIG, conditional=first)
    grid = (4, 3, 5)
    cos, sin = rotary_angles(coordinates(grid, (1, 1, 1), fps, 8, "absolute")[None], config)
    frame, row, column = np.indices(grid).reshape(3, -1)
    seconds = (np.maximum(8 * frame - 7, 0) if first else 8 * frame) / fps
    position = np.stack([seconds / 20, row * 32 / 2048, column * 32 / 2048], -1)
    flat = [np.asarray(part).reshape(len(frame), -1) for part in (cos, sin)]
    np.testing.assert_array_equal(
        [part[:, 0] for part in flat], [np.ones(60), np.zeros(60)]
    )  # one spare pair
    for place, frequency, atol in ((1, np.pi / 2, 1e-6), (-3, 1e4 * np.pi / 2, 4e-3)):
        angles = (2 * position - 1) * frequency
        for part, function in zip(flat, (np.cos, np.sin), strict=True):
            got = part[:, place : place + 3 or None]
            np.testing.assert_allclose(got, function(angles), atol=atol)


def test_a_token_sees_the_caption_that_is_active_at_its_time(model):
    """The text of a second caption changes only what is shown after it begins, before any self-attention."""
    one = segment(GOLDEN["latent"], np.concatenate([GOLDEN["text"], GOLDEN["text"][::-1]]))
    time = np.repeat(np.float32([0.0, 0.5]), len(GOLDEN["text"]))
    caption_time = np.where(one.coords[:, 0] >= 0.6, 0.5, 0).astype(np.float32)
    shallow_weights = {n: v for n, v in draw_all(NAMES).items() if not n.startswith("transformer_blocks.1")}
    shallow = PUBLISHED_LTX.load(dataclasses.replace(CONFIG, layers=1), shallow_weights)
    changed = one.text.copy()
    changed[len(GOLDEN["text"]) :] += 1
    results = []
    for text in (one.text, changed):
        told = dataclasses.replace(one, text=text, text_time=time, caption_time=caption_time)
        batch, (place,) = pack_batch([[told]], 1, 48, 16, 4)
        results += unpack(velocity(shallow, batch, sigmas(batch)), [place])
    moved = np.abs(results[0] - results[1]).max(-1) > 1e-6
    np.testing.assert_array_equal(moved, caption_time > 0)


def test_names_are_those_of_diffusers_and_of_the_original():
    published = dict(published_shapes(CONFIG))
    assert {name: tuple(shape) for name, shape in NAMES} == published
    backward = {
        r"^proj_in": "patchify_proj",
        r"^time_embed": "adaln_single",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
        "^": "model.diffusion_model.",
    }
    original = {}
    for name, shape in published.items():
        for ours, theirs in backward.items():
            name = re.sub(ours, theirs, name)
        original[name] = shape
    assert diffusers_names(original | {"vae.decoder.conv_in.conv.bias": (8,)}) == published


def test_weights_are_written_as_they_were_read(model):
    given = draw_all(NAMES)
    written = PUBLISHED_LTX.publish(model.config, named_leaves(model))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"proj_in.weight": None}, r"'proj_in.weight' is missing"),
        ({"extra": np.zeros(3)}, "'extra' is unknown"),
        ({"proj_out.bias": np.zeros(3)}, r"'proj_out.bias' is \(3,\) where config.json says \(8,\)"),
    ],
)
def test_a_file_that_differs_from_its_settings_is_refused(change, sentence):
    tensors = draw_all(NAMES) | change
    with pytest.raises(UserError, match=sentence):
        PUBLISHED_LTX.load(CONFIG, {name: value for name, value in tensors.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"out_channels": 16}, "takes 8 channels and gives 16"),
        ({"cross_attention_dim": 64}, "cross_attention_dim=64"),
        ({"attention_head_dim": 15, "cross_attention_dim": 30}, "even width"),
        ({"num_heads": 4}, "isn't known, 'num_heads'=4"),
    ],
)
def test_settings_of_other_models_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        ltx_config(SETTINGS | change)


def test_the_published_model_has_two_billion_parameters():
    config = LTXConfig()
    assert (config.width, config.patch_width, config.text_positions(128)) == (2048, 128, 0)
    count = sum(int(np.prod(shape)) for _, shape in published_shapes(config))
    assert round(count / 1e6) == 1923
    assert ltx_config({}) == config
