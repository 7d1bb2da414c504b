"""The diffusion transformer: one sequence of text and video tokens, a σ per token.

Conditions are a table (see `packing.PackedBatch`): `sigma[b, 0]` is 0, that of conditioning tokens, and `sigma[b, s]`
that of condition s, of a segment and its active caption. The modulation of adaLN-Zero (Peebles and Xie 2022)
is computed once per condition and gathered by the tokens that have it.
Layers are stacked along a leading axis and scanned, so compile time does not grow with depth.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Coords, Patches, SegmentIds, Sigma
from sora_jax.distributed.mesh import check_sequence_split, constrain
from sora_jax.models.attention.dispatch import attend, cross_attend
from sora_jax.models.dit_config import POLICIES, DiTConfig
from sora_jax.models.layers import (
    Linear,
    fourier,
    gather_conditions,
    gather_positions,
    rms_norm,
    rotary_angles,
    rotate,
)
from sora_jax.models.step_cache import StepCache, run_layers
from sora_jax.tokens.packing import PackedBatch

POSITION_WIDTH = 32
_ROUND = 32  # positions of a shortened sequence come in multiples of this, for attention's blocks


class Routing(NamedTuple):
    """Tokens that skip the layers between the first and the last, in training (TREAD, Krause et al. 2025).

    Attributes:
      key: draws which; text tokens never skip.
      share: of the video positions, so that shapes are known.
    """

    key: jax.Array
    share: float


MIN_SIGMA = 0.05
"""Below it the velocity of a prediction of clean patches is no longer divided by σ but by this (Li and He 2025)."""


class Captions(NamedTuple):
    """The tokens of captions beside the sequence, of which each has its own segment's.

    Attributes:
      states: float[B,M,D].
      angles: see `layers.rotary_angles`; [B,M,F/2] each.
      segment_ids: int32[B,M].
    """

    states: jax.Array
    angles: tuple[jax.Array, jax.Array]
    segment_ids: jax.Array


class CrossAttention(nnx.Module):
    """From a token to its segment's caption (Peebles and Xie 2023, section 3.2).

    Unmodulated, and zero at the beginning, as PixArt-α's (Chen et al. 2023, section 2.3). A caption's time enters by
    rotation, as it does among the sequence's own tokens.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        D, head_width = config.width, config.width // config.heads
        self.q = Linear(D, (config.heads, head_width), letters="DHF", rngs=rngs)
        self.kv = Linear(D, (2, config.heads, head_width), letters="D2HF", rngs=rngs)
        self.qk_scale = nnx.Param(jnp.ones((2, head_width)))
        self.out = Linear(D, D, 0.0, letters="WD", rngs=rngs)

    def __call__(
        self,
        x_bnd: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_bn: SegmentIds,
        captions: Captions,
        config: DiTConfig,
    ) -> jax.Array:
        """What the residual stream gains, [B, N, D]."""
        q = constrain(self.q(rms_norm(x_bnd).astype(config.dtype)), "BNHF")
        k, v = (constrain(x.squeeze(2), "BMHF") for x in jnp.split(self.kv(captions.states), 2, axis=2))
        qk_scale = self.qk_scale[...]
        q = constrain(rotate(rms_norm(q, qk_scale[0]), angles), "BNHF")
        k = constrain(rotate(rms_norm(k, qk_scale[1]), captions.angles), "BMHF")
        h = constrain(cross_attend(q, k, v, segment_ids_bn, captions.segment_ids), "BNHF")
        return self.out(h.reshape(x_bnd.shape))


class Block(nnx.Module):
    """Attention and an MLP, each behind adaLN-Zero: x + gate · f(norm(x) · (1 + scale) + shift).

    Between them, with `caption="cross"`, cross-attention.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        D, head_width = config.width, config.width // config.heads
        self.modulation = Linear(D, 6 * D, 0.0, rngs=rngs)
        self.qkv = Linear(D, (3, config.heads, head_width), letters="D3HF", rngs=rngs)
        self.qk_scale = nnx.Param(jnp.ones((2, head_width)))
        self.out = Linear(D, D, letters="WD", rngs=rngs)
        self.up = Linear(D, config.mlp_ratio * D, letters="DW", rngs=rngs)
        self.down = Linear(config.mlp_ratio * D, D, letters="WD", rngs=rngs)
        if config.caption == "cross":
            self.cross = CrossAttention(config, rngs=rngs)

    def __call__(
        self,
        x_bnd: jax.Array,
        condition_bsd: jax.Array,
        index_bn: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_bn: SegmentIds,
        config: DiTConfig,
        captions: Captions | None = None,
    ) -> jax.Array:
        B, N, D = x_bnd.shape
        dtype = jnp.dtype(config.dtype)
        modulation = gather_conditions(self.modulation(condition_bsd.astype(dtype)), index_bn)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)

        h = rms_norm(x_bnd).astype(dtype) * (1 + scale1) + shift1
        q, k, v = (constrain(x.squeeze(2), "BNHF") for x in jnp.split(self.qkv(h), 3, axis=2))
        qk_scale = self.qk_scale[...]
        # Constrained, or a mesh's all-to-alls take the rotated halves one by one.
        q = constrain(rotate(rms_norm(q, qk_scale[0]), angles), "BNHF")
        k = constrain(rotate(rms_norm(k, qk_scale[1]), angles), "BNHF")
        h = attend(q, k, v, segment_ids_bn, config.attention, config.sequence)
        h = constrain(h, "BNHF").reshape(B, N, D)
        x_bnd = constrain(x_bnd + gate1 * self.out(h), "BND")
        if captions is not None:
            x_bnd = constrain(x_bnd + self.cross(x_bnd, angles, segment_ids_bn, captions, config), "BND")

        h = rms_norm(x_bnd).astype(dtype) * (1 + scale2) + shift2
        return constrain(x_bnd + gate2 * self.down(jax.nn.gelu(self.up(h))), "BND")


class DiT(nnx.Module):
    """See the module's docstring. `blocks` is one `Block` whose parameters carry a leading L axis."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        D = config.width
        self.config = config
        self.patch_in = Linear(config.patch_width, D, rngs=rngs)
        if config.caption != "pooled":
            self.text_in = Linear(config.text_width, D, rngs=rngs)
        if config.absolute:
            self.position_in = Linear(5 * POSITION_WIDTH, D, 0.0, rngs=rngs)
        if config.reference_frames:
            self.reference_in = Linear(2 * (config.patch_width + 1), D, 0.0, rngs=rngs)
        self.sigma_in = Linear(256, D, rngs=rngs)
        self.sigma_out = Linear(D, D, rngs=rngs)
        if config.flow_map:
            self.interval_in = Linear(256, D, 0.0, rngs=rngs)
        if config.pooled_text:
            self.pooled_in = Linear(config.text_width, D, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.modulation = Linear(D, 2 * D, 0.0, rngs=rngs)
        self.patch_out = Linear(D, config.patch_width, 0.0, rngs=rngs)

    def __call__(
        self,
        patches_bnp: Patches,
        batch: PackedBatch,
        sigma_bs: Sigma,
        next_sigma_bs: Sigma | None = None,
        routing: Routing | None = None,
        cache: StepCache | None = None,
    ) -> Any:
        """Velocity of every token, float32 [B, N, P]; given a cache, that and the cache for the next evaluation.

        Args:
          patches_bnp: noisy latent patches.
          batch: everything else about the sequences; its own `patches` are not used.
          sigma_bs: the σ of each condition; that of condition 0, of conditioning tokens, is 0.
          next_sigma_bs: the σ that the step goes to, of each condition; for a flow map. None: the velocity at σ.
          routing: tokens that skip layers; None: none does.
          cache: see `models.step_cache`; None: every layer is evaluated.

        Raises:
          UserError: the mesh's `sequence` doesn't divide the positions, or its `tensor` and `sequence` the heads.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        M = config.text_positions(batch.text.shape[1])
        check_sequence_split(patches_bnp.shape[1], M)
        text_states = rms_norm(batch.text)
        condition = self._conditions(sigma_bs, text_states, batch, next_sigma_bs)
        captions = self._captions(text_states, batch) if config.caption == "cross" else None
        batch, text_states = batch.with_text_positions(M), text_states[:, :M]
        segment_ids = jnp.concatenate([batch.text_segment_ids, batch.segment_ids], axis=1)
        # Each segment's text before its patches, padding last: segments are then contiguous, and attention skips as
        # many blocks as it can. Narrow arrays are permuted so, and wide ones computed from them.
        order = jnp.argsort(jnp.where(segment_ids > 0, segment_ids, segment_ids.shape[1]), axis=1)
        inverse = jnp.argsort(order, axis=1)
        permute = lambda array, letters: constrain(_take(array, order), letters)
        of_patches = lambda array: permute(jnp.pad(array, ((0, 0), (M, 0), (0, 0))), "BNP")
        segment_ids = permute(segment_ids, "BN")
        index = permute(jnp.concatenate([batch.text_condition_ids, batch.condition_ids], axis=1), "BN")
        coords = permute(jnp.concatenate([_text_coords(batch), batch.coords], axis=1), "BNC")

        patches = self.patch_in(of_patches(patches_bnp).astype(dtype))
        if config.absolute:
            patches = patches + self.position_in(_position(coords, config).astype(dtype))
        if config.reference_frames:
            patches = patches + self.reference_in(of_patches(batch.reference).astype(dtype))
        x = patches
        if M:  # or there is no text to gather from
            text = gather_positions(
                self.text_in(text_states.astype(dtype)), jnp.minimum(order, M - 1), inverse[:, :M]
            )
            x = jnp.where((order < M)[..., None], text, x)
        x = constrain(x.astype(jnp.float32), "BND")
        angles = self._angles(coords)

        run = functools.partial(_run_layers, condition=condition, config=config, captions=captions)
        if routing is None:
            x, cache = run(self.blocks, x, index, angles, segment_ids, cache=cache)
        else:
            layers = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], self.blocks)
            kept, left = _draw_routes(routing, order < M, segment_ids, x.shape[1] - M, M)
            x, _ = run(layers(0, 1), x, index, angles, segment_ids)
            through, _ = run(
                layers(1, -1),
                gather_positions(x, kept, left),
                *jax.tree.map(lambda array: _take(array, kept), (index, angles, segment_ids)),
            )
            x = jnp.where((left >= 0)[..., None], gather_positions(through, jnp.maximum(left, 0), kept), x)
            x, _ = run(layers(-1, None), x, index, angles, segment_ids)
        modulation = gather_conditions(self.modulation(condition, "highest"), index)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        velocity = self.patch_out(rms_norm(x) * (1 + scale) + shift)
        velocity = constrain(gather_positions(velocity, inverse[:, M:], order - M), "BNP")
        if config.predict == "clean":
            sigma = _take(sigma_bs, batch.condition_ids)[..., None]
            velocity = (patches_bnp - velocity) / jnp.maximum(sigma, MIN_SIGMA)
        return velocity if cache is None else (velocity, cache)

    def _conditions(
        self, sigma_bs: Sigma, text_bme: jax.Array, batch: PackedBatch, next_sigma_bs: Sigma | None = None
    ) -> jax.Array:
        """float32[B,S,D], of σ and captions; exact on accelerators too, as the table is small."""
        features = functools.partial(fourier, width=256, longest=4.0, shortest=2e-3)
        condition = self.sigma_in(features(sigma_bs), "highest")
        if self.config.flow_map:
            interval = sigma_bs - (sigma_bs if next_sigma_bs is None else next_sigma_bs)
            condition = condition + self.interval_in(features(interval), "highest")
        if self.config.pooled_text:
            condition = condition + self.pooled_in(_pool(text_bme, batch), "highest")
        return jax.nn.silu(self.sigma_out(jax.nn.silu(condition), "highest"))

    def _captions(self, text_bme: jax.Array, batch: PackedBatch) -> Captions:
        states = constrain(self.text_in(text_bme.astype(self.config.dtype)), "BMD")
        return Captions(states, self._angles(_text_coords(batch)), batch.text_segment_ids)

    def _angles(self, coords_bn5: Coords) -> tuple[jax.Array, jax.Array]:
        return rotary_angles(coords_bn5, self.config.width // self.config.heads, self.config.rope_periods)


def _run_layers(
    blocks: Block,
    x_bnd: jax.Array,
    index_bn: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_bn: SegmentIds,
    condition: jax.Array,
    config: DiTConfig,
    captions: Captions | None,
    cache: StepCache | None = None,
) -> tuple[jax.Array, StepCache | None]:
    """The stacked blocks, see `step_cache.run_layers`."""

    def layer(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
        return block(x, condition, index_bn, angles, segment_ids_bn, config, captions), None

    return run_layers(layer, x_bnd, blocks, segment_ids_bn, POLICIES[config.remat], cache)


def _draw_routes(
    routing: Routing, text_bn: jax.Array, segment_ids_bn: SegmentIds, positions: int, text_positions: int
) -> tuple[jax.Array, jax.Array]:
    """Which positions don't skip, int[B, R] in their order, and the place of each position there, or -1: int[B, N].

    Padding skips first.
    """
    count = text_positions + min(_ROUND * math.ceil((1 - routing.share) * positions / _ROUND), positions)
    score = jax.random.uniform(routing.key, text_bn.shape)
    score = jnp.where(segment_ids_bn > 0, jnp.where(text_bn, -1.0, score), 2.0)
    kept = jnp.sort(jnp.argsort(score, axis=1)[:, :count], axis=1)
    rows = jnp.arange(len(kept))[:, None]
    return kept, jnp.full(text_bn.shape, -1).at[rows, kept].set(jnp.arange(count))


def _take(array: jax.Array, index_bn: jax.Array) -> jax.Array:
    """array[index] in each sequence."""
    return jnp.take_along_axis(array, index_bn.reshape(*index_bn.shape, *(1,) * (array.ndim - 2)), axis=1)


def _text_coords(batch: PackedBatch) -> jax.Array:
    """Text is at the frame's centre, from when its caption is active: [B, M, 5]."""
    return jnp.pad(batch.text_time[..., None], ((0, 0), (0, 0), (0, 4)))


def _pool(text_bme: jax.Array, batch: PackedBatch) -> jax.Array:
    """The mean of the active caption's states under each condition, [B, S, E]; zero where there is none."""
    same_segment = batch.condition_segment_ids[:, :, None] == batch.text_segment_ids[:, None, :]
    active = batch.condition_caption_time[:, :, None] == batch.text_time[:, None, :]
    owned = (same_segment & active & (batch.condition_segment_ids[:, :, None] > 0)).astype(text_bme.dtype)
    total = jnp.einsum("bsm,bme->bse", owned, text_bme, precision="highest")
    return total / jnp.maximum(owned.sum(-1, keepdims=True), 1.0)


def _position(coords_bn5: Coords, config: DiTConfig) -> jax.Array:
    """Fourier features of each token's box, [B, N, 5 · POSITION_WIDTH], at RoPE's periods."""
    time, space = config.rope_periods
    axes = [
        fourier(coords_bn5[..., i], POSITION_WIDTH, *periods)
        for i, periods in enumerate((time, space, space, time, space))
    ]
    return jnp.concatenate(axes, axis=-1)
