"""Captions beside the sequence, by cross-attention or pooled alone: packed = alone, and each segment reads its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.packed import pack_segments
from helpers.tiny_batch import wave
from helpers.tiny_dit import (
    BATCH,
    CONFIG,
    PLACES,
    SEGMENTS,
    SIGMAS,
    TABLE,
    K,
    M,
    N,
    forward,
    forward_backward,
    make_dit,
    sigma_table,
    unrolled,
    velocity,
)

from sora_jax.diffusion.guidance import without_caption
from sora_jax.errors import UserError
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig, forward_flops, segment_flops
from sora_jax.tokens.packing import PackedBatch, unpack

WAYS = {"cross": {"caption": "cross"}, "pooled": {"caption": "pooled", "pooled_text": True}}
CAPTIONED = [i for i, segment in enumerate(SEGMENTS) if len(segment.text)]


@pytest.fixture(scope="module", params=WAYS)
def model(request) -> DiT:
    return make_dit(dataclasses.replace(CONFIG, **WAYS[request.param]))


@pytest.fixture(scope="module")
def outputs(model) -> list[np.ndarray]:
    """Each segment's velocity in the packed batch."""
    return unpack(forward(model, BATCH, TABLE), PLACES)


def test_packed_equals_alone(model):
    """Velocities and gradients: all of a batch are the sum of each segment's own."""
    weights = np.zeros((2, N, CONFIG.patch_width), np.float32)
    total, own_weights = None, [wave(place.length, CONFIG.patch_width, pitch=3) for place in PLACES]
    for place, own in zip(PLACES, own_weights, strict=True):
        weights[place.row, place.start : place.start + place.length] = own
    packed, (in_parameters, in_patches) = forward_backward(model, BATCH, TABLE, weights)
    for i, place in enumerate(PLACES):
        batch, (there,) = pack_segments([SEGMENTS[i]], N, M, K, batch_size=2)
        weights = np.zeros_like(weights)
        weights[0, : there.length] = own_weights[i]
        table = sigma_table([SIGMAS[i]], [there], batch)
        alone, (alone_in_parameters, alone_in_patches) = forward_backward(model, batch, table, weights)
        np.testing.assert_allclose(
            *(unpack(x, [at])[0] for x, at in ((packed, place), (alone, there))), atol=1e-5
        )
        np.testing.assert_allclose(
            *(unpack(x, [at])[0] for x, at in ((in_patches, place), (alone_in_patches, there))), atol=1e-5
        )
        total = alone_in_parameters if total is None else jax.tree.map(jnp.add, total, alone_in_parameters)
    for ours, theirs in zip(jax.tree.leaves(in_parameters), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1))


@pytest.mark.parametrize("i", CAPTIONED)
def test_a_caption_has_a_part_in_its_own_segment_alone(model, outputs, i):
    own = (BATCH.text_segment_ids == PLACES[i].segment_id) & (np.arange(2) == PLACES[i].row)[:, None]
    changed = dataclasses.replace(BATCH, text=np.where(own[..., None], -BATCH.text, BATCH.text))
    for j, (ours, theirs) in enumerate(
        zip(unpack(forward(model, changed, TABLE), PLACES), outputs, strict=True)
    ):
        if i == j:
            assert np.abs(ours - theirs).max() > 1e-3
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_without_captions_nothing_of_them_is_left(model, outputs):
    """As guidance asks for it: the words are there and belong to no segment; or there is no room for words."""
    dropped = unpack(forward(model, without_caption(BATCH), TABLE), PLACES)
    other = dataclasses.replace(without_caption(BATCH), text=-3 * BATCH.text)
    np.testing.assert_array_equal(forward(model, other, TABLE), forward(model, without_caption(BATCH), TABLE))
    empty = unpack(forward(model, BATCH.with_text_positions(0), TABLE), PLACES)
    for i, (ours, theirs, captioned) in enumerate(zip(dropped, empty, outputs, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert (np.abs(ours - captioned).max() > 1e-3) == (i in CAPTIONED)


def test_cross_attention_begins_at_zero():
    config = dataclasses.replace(CONFIG, **WAYS["cross"])
    fresh = jax.jit(lambda: DiT(config, rngs=nnx.Rngs(0)).blocks.cross.out.kernel[...])()
    assert fresh.shape == (config.layers, config.width, config.width) and not np.any(fresh)


def test_a_caption_that_reaches_nothing_is_refused():
    with pytest.raises(UserError, match="pooled_text=True"):
        dataclasses.replace(CONFIG, caption="pooled")


@pytest.mark.parametrize("caption", ["tokens", *WAYS])
def test_the_count_of_operations_is_the_compilers(caption, monkeypatch):
    """One segment that fills its sequence, as in test_dit_config; words as many as half of its tokens."""
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    words, tokens = 64, 128
    config = DiTConfig(
        size="",
        width=256,
        layers=2,
        heads=4,
        dtype="float32",
        attention="reference",
        caption=caption,
        pooled_text=True,
    )
    model = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    batch = PackedBatch.shapes(1, tokens, words, 1, config.patch_width, config.text_width, reference=False)
    table = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    counted = jax.jit(lambda *given: velocity(*given)).lower(model, batch, table).cost_analysis()["flops"]
    assert segment_flops(config, tokens, words) == pytest.approx(counted, rel=0.15)
    both = segment_flops(config, np.array([tokens, 3.0]), np.array([words, 0.0])).sum()
    assert both == segment_flops(config, tokens, words) + forward_flops(config, 3, 9)
