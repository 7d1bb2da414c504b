"""Wan's transformer against diffusers (golden arrays of tools/parity/wan.py), and packed against alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusers_folder import golden
from helpers.parity import draw_all, relative_error
from wan_check import run, segment, sigmas, velocity

from sora_jax.checkpoints.store import named_leaves
from sora_jax.errors import UserError
from sora_jax.models.attention.dispatch import attend_padded, cross_attend
from sora_jax.models.wan import Wan, WanConfig
from sora_jax.models.wan_weights import PUBLISHED_WAN, diffusers_names, published_shapes, wan_config
from sora_jax.tokens.packing import PackedBatch, pack_batch, unpack
from sora_jax.tokens.patches import patchify

GOLDEN = golden("wan_tiny")
NAMES, SETTINGS = GOLDEN["names"], GOLDEN["config"]
CONFIG = wan_config(SETTINGS)
LATENT, TEXT = GOLDEN["latent"][0].transpose(1, 2, 3, 0), GOLDEN["text"][0]


@pytest.fixture(scope="module")
def model() -> Wan:
    return PUBLISHED_WAN.load(CONFIG, draw_all(NAMES))


@pytest.mark.parametrize(("given", "expected"), [(0, "velocity"), (1, "velocity_by_token")])
def test_velocities_are_those_of_diffusers(model, given, expected):
    """With one timestep for all, and with timestep 0 where the first frame is given."""
    assert relative_error(run(model, GOLDEN, given), GOLDEN[expected][0]) < 1e-4


def test_bfloat16_is_as_near_as_pytorchs_own():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = PUBLISHED_WAN.load(config, draw_all(NAMES), dtype=jnp.bfloat16)
    theirs = relative_error(GOLDEN["velocity_bfloat16"][0], GOLDEN["velocity"][0])
    assert 0 < relative_error(run(rounded, GOLDEN), GOLDEN["velocity"][0]) < 1.5 * theirs


def test_packed_is_alone_forward_and_gradient(model):
    generator = np.random.default_rng(3)
    shapes, words = [(3, 4, 6), (1, 4, 4), (2, 6, 4)], [5, 0, 9]
    segments = [
        segment(
            generator.standard_normal((*shape, 4), np.float32),
            generator.standard_normal((count, 16), np.float32),
            given=int(shape[0] > 2),
        )
        for shape, count in zip(shapes, words, strict=True)
    ]
    weights = [generator.standard_normal(one.patches.shape).astype(np.float32) for one in segments]

    @jax.jit
    def loss(model: Wan, batch: PackedBatch, sigma: np.ndarray, weight: np.ndarray) -> jax.Array:
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


def test_a_key_that_stands_for_many_is_as_many():
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)
    q, k, v = draw(1, 6, 2, 8), draw(1, 4, 2, 8), draw(1, 4, 2, 8)
    ids = np.ones((1, 6), np.int32)
    for repeats in (0, 1, 5):
        index = [0, 1, 2] + [3] * repeats
        wanted = cross_attend(q, k[:, index], v[:, index], ids, np.ones((1, len(index)), np.int32))
        mask = np.ones((1, 6, 4), bool)
        got = attend_padded(q, k, v, mask, np.full((1, 6), repeats, np.float32))
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_token_sees_the_caption_that_is_active_at_its_time(model):
    """The text of a second caption changes only what is shown after it begins, before any self-attention."""
    one = segment(LATENT, np.concatenate([TEXT, TEXT[::-1]]))
    time = np.repeat(np.float32([0.0, 0.25]), len(TEXT))
    caption_time = np.where(one.coords[:, 0] >= 1, 0.25, 0).astype(np.float32)
    config = dataclasses.replace(CONFIG, layers=1)
    shallow = PUBLISHED_WAN.load(
        config, {n: v for n, v in draw_all(NAMES).items() if not n.startswith("blocks.1")}
    )
    changed = one.text.copy()
    changed[len(TEXT) :] += 1
    results = []
    for text in (one.text, changed):
        told = dataclasses.replace(one, text=text, text_time=time, caption_time=caption_time)
        batch, (place,) = pack_batch([[told]], 1, 32, 16, 4)
        results += unpack(velocity(shallow, batch, sigmas(batch, 0.75)), [place])
    moved = np.abs(results[0] - results[1]).max(-1) > 1e-6
    np.testing.assert_array_equal(moved, caption_time > 0)


def test_the_original_codes_names_are_read_too():
    published = dict(published_shapes(CONFIG))
    backward = {
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_out.0": "cross_attn.o",
        "attn1.to_": "self_attn.",
        "attn2.to_": "cross_attn.",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
    }
    original = {}
    for name, shape in published.items():
        old = name
        for ours, theirs in backward.items():
            old = old.replace(ours, theirs)
        if name.endswith("scale_shift_table"):
            old = name.replace("scale_shift_table", "modulation" if "blocks" in name else "head.modulation")
        original[old] = shape
    assert diffusers_names(original) == published
    assert {name: tuple(shape) for name, shape in NAMES} == published


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks.0.attn1.to_q.weight": None}, r"'blocks.0.attn1.to_q.weight' is missing"),
        ({"extra": np.zeros(3)}, "'extra' is unknown"),
        ({"proj_out.bias": np.zeros(3)}, r"'proj_out.bias' is \(3,\) where config.json says \(16,\)"),
    ],
)
def test_a_file_that_differs_from_its_settings_is_refused(change, sentence):
    tensors = draw_all(NAMES) | change
    with pytest.raises(UserError, match=sentence):
        PUBLISHED_WAN.load(CONFIG, {name: value for name, value in tensors.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_dim": 1280}, "image_dim=1280"),
        ({"in_channels": 8, "out_channels": 16}, "takes 8 channels and gives 16"),
        ({"num_heads": 4}, "isn't known, 'num_heads'=4"),
    ],
)
def test_settings_of_other_models_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        wan_config(SETTINGS | change)


def test_a_config_says_what_pipelines_ask():
    assert (WanConfig().width, WanConfig().patch_width) == (1536, 64)
    assert WanConfig().text_positions(512) == 0
    assert patchify(LATENT, CONFIG.patch).shape == (18, CONFIG.patch_width)


def test_weights_are_written_as_they_were_read(model):
    given = draw_all(NAMES)
    written = PUBLISHED_WAN.publish(model.config, named_leaves(model))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
