"""Wan's transformer (Wan team 2025, arXiv:2503.20314) on packed sequences: a sigma per condition, captions beside.

The same call as `models.dit.DiT`. What differs from it: captions reach the tokens by cross-attention alone, after a
norm with weights and without a gate; queries and keys are normalized over all heads together; the modulation of
adaLN-Zero is a table of each layer plus one projection that layers share; RoPE counts patches.

Wan was trained with captions padded to 512 positions of zeros, all of which are attended to. They are equal, so one
key stands for them (`attention.dispatch.attend_padded`).

Wan2.1 and 2.2 have this architecture, text to video and image to video. Of the latter the picture is given as channels
beside the noisy ones; Wan2.1 also attends to an image encoder's states of it (section 5.1). TI2V-5B was trained with a
timestep per token, 0 where frames are given: these are this package's conditioning tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.axes import Patches, SegmentIds, Sigma
from sora_jax.distributed.mesh import HEADS, check_sequence_split, constrain
from sora_jax.errors import UserError
from sora_jax.models.attention.dispatch import attend, attend_masked, attend_padded
from sora_jax.models.dit_config import POLICIES, Backend
from sora_jax.models.layers import (
    Linear,
    gather_conditions,
    layer_norm,
    norm_heads,
    rotate,
    timestep_features,
)
from sora_jax.models.step_cache import StepCache, run_layers
from sora_jax.tokens.packing import PackedBatch
from sora_jax.tokens.patches import CoordinateMode

TIMESTEPS = 1000  # a sigma of 1
THETA = 10_000.0  # of RoPE and of the timestep's features
PICTURE_EPSILON = 1e-5  # of the norms of pictures' states
_LONGEST = 1024  # positions along an axis whose angles are tabulated


Pictures: TypeAlias = tuple[
    jax.Array, jax.Array
]  # states [B,I,D], and bool[B,N,I], which of them tokens attend to


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape of the transformer; names of diffusers' `transformer/config.json` in brackets.

    Attributes:
      layers, heads, head_width: [num_layers, num_attention_heads, attention_head_dim].
      hidden: width of an MLP [ffn_dim].
      channels: of the latent, and of the velocity [out_channels].
      extra_channels: that are given beside the latent's, of image-to-video models [in_channels - out_channels].
      picture_width: V, of the image encoder's states, which tokens attend to beside their caption [image_dim]; 0: none.
      picture_positions: states of a segment's two pictures, each given its position [pos_embed_seq_len]; 0: not.
      patch: latent cells a token spans [patch_size].
      text_width: of the text encoder's states [text_dim].
      text_padding: positions to which captions were padded in training.
      time_width: numbers of the timestep's features [freq_dim].
      cross_norm: whether there is a norm before cross-attention [cross_attn_norm].
      epsilon: of the norms [eps].
      reference: whose arithmetic is followed where the original code and diffusers differ. "original" keeps the
        residual stream in float32 and computes the timestep's features in float64; "diffusers" rounds the stream to
        `dtype` after each branch.
      whole_timesteps: whether the timestep is rounded down to an integer, as with the UniPC solver in both.
      dtype: of the arithmetic; norms, modulation and softmax are float32.
      remat, attention, sequence: as `models.dit_config.DiTConfig`.
    """

    layers: int = 30
    heads: int = 12
    head_width: int = 128
    hidden: int = 8960
    channels: int = 16
    extra_channels: int = 0
    picture_width: int = 0
    picture_positions: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    text_width: int = 4096
    text_padding: int = 512
    time_width: int = 256
    cross_norm: bool = True
    epsilon: float = 1e-6
    reference: Literal["original", "diffusers"] = "diffusers"
    whole_timesteps: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    remat: Literal["all", "dots", "none"] = "all"
    attention: Backend = "auto"
    sequence: Literal["heads", "ring"] = "heads"

    # What pipelines ask of a transformer's configuration.
    coords: CoordinateMode = dataclasses.field(default="latent", init=False, repr=False)
    flow_map: bool = dataclasses.field(default=False, init=False, repr=False)
    reference_frames: bool = dataclasses.field(default=False, init=False, repr=False)
    caption: Literal["cross"] = dataclasses.field(default="cross", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.head_width % 2 or self.head_width < 6:
            raise UserError(f"Wan's heads are of an even width of 6 or more, not {self.head_width}.")
        if self.extra_channels < 0:
            raise UserError(
                f"This transformer takes {self.channels + self.extra_channels} channels and gives {self.channels}: no "
                "model of Wan gives more than it takes."
            )

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_width

    @property
    def patch_width(self) -> int:
        """P, numbers a token holds."""
        return math.prod(self.patch) * self.channels

    @property
    def extra_width(self) -> int:
        """X, of `packing.Segment.extra_channels`."""
        return math.prod(self.patch) * self.extra_channels

    @property
    def heads_over(self) -> tuple[str, ...]:
        """The axes of a mesh that must divide the heads, together."""
        return ("tensor",) if self.sequence == "ring" else HEADS

    def text_positions(self, text_len: int) -> int:
        """Of so many text positions, how many are in the sequence that self-attention sees: none."""
        return 0

    @property
    def stream_dtype(self) -> str:
        """Of the residual stream."""
        return "float32" if self.reference == "original" else self.dtype

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Pairs of a head's numbers that rotate with time, y and x."""
        space = self.head_width // 6
        return self.head_width // 2 - 2 * space, space, space


class CrossAttention(nnx.Module):
    """From a token to its active caption, and to the pictures that are given."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        D, heads = config.width, (config.heads, config.head_width)
        if config.cross_norm:
            self.norm_scale, self.norm_bias = nnx.Param(jnp.ones(D)), nnx.Param(jnp.zeros(D))
        self.q = Linear(D, heads, letters="DHF", rngs=rngs)
        self.kv = Linear(D, (2, *heads), letters="D2HF", rngs=rngs)
        self.qk_scale = nnx.Param(jnp.ones((2, *heads)))
        if config.picture_width:
            self.picture_kv = Linear(D, (2, *heads), letters="D2HF", rngs=rngs)
            self.picture_k_scale = nnx.Param(jnp.ones(heads))
        self.out = Linear(D, D, letters="WD", rngs=rngs)

    def __call__(
        self,
        x_bnd: jax.Array,
        text_bmd: jax.Array,
        mask_bnm: jax.Array,
        pictures: Pictures | None,
        config: WanConfig,
    ) -> jax.Array:
        """What the residual stream gains, [B, N, D]; the last of the text positions is the padding."""
        h = x_bnd
        if config.cross_norm:
            h = layer_norm(h, config.epsilon) * self.norm_scale[...] + self.norm_bias[...]
        scale = self.qk_scale[...]
        q = norm_heads(constrain(self.q(h.astype(config.dtype)), "BNHF"), scale[0], config.epsilon)
        k, v = (constrain(x.squeeze(2), "BMHF") for x in jnp.split(self.kv(text_bmd), 2, axis=2))
        k = norm_heads(k, scale[1], config.epsilon)
        padding = jnp.maximum(config.text_padding - mask_bnm[..., :-1].sum(-1), 0).astype(jnp.float32)
        h = constrain(attend_padded(q, k, v, mask_bnm, padding), "BNHF")
        if pictures is not None:
            states, mask = pictures
            k, v = (constrain(x.squeeze(2), "BMHF") for x in jnp.split(self.picture_kv(states), 2, axis=2))
            k = norm_heads(k, self.picture_k_scale[...], config.epsilon)
            h += constrain(attend_masked(q, k, v, mask), "BNHF")
        return self.out(h.reshape(x_bnd.shape))


class Block(nnx.Module):
    """Self-attention and an MLP, each x + gate · f(norm(x) · (1 + scale) + shift), cross-attention between them."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        D, heads = config.width, (config.heads, config.head_width)
        self.modulation = nnx.Param(jnp.zeros((6, D)))
        self.qkv = Linear(D, (3, *heads), letters="D3HF", rngs=rngs)
        self.qk_scale = nnx.Param(jnp.ones((2, *heads)))
        self.out = Linear(D, D, letters="WD", rngs=rngs)
        self.cross = CrossAttention(config, rngs=rngs)
        self.up = Linear(D, config.hidden, letters="DW", rngs=rngs)
        self.down = Linear(config.hidden, D, letters="WD", rngs=rngs)

    def __call__(
        self,
        x_bnd: jax.Array,
        config: WanConfig,
        condition_bs6d: jax.Array,
        index_bn: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_bn: SegmentIds,
        text_bmd: jax.Array,
        mask_bnm: jax.Array,
        pictures: Pictures | None,
    ) -> jax.Array:
        dtype, kept = jnp.dtype(config.dtype), x_bnd.dtype
        modulation = condition_bs6d + self.modulation[...].astype(jnp.float32)
        # One by one: a gather that its only use takes in is never written to memory.
        of_tokens = lambda i: gather_conditions(modulation[:, :, i], index_bn)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = map(of_tokens, range(6))

        h = (layer_norm(x_bnd, config.epsilon) * (1 + scale) + shift).astype(dtype)
        q, k, v = (constrain(x.squeeze(2), "BNHF") for x in jnp.split(self.qkv(h), 3, axis=2))
        qk_scale = self.qk_scale[...]
        q, k = (
            constrain(rotate(norm_heads(x, own, config.epsilon).astype(jnp.float32), angles), "BNHF")
            for x, own in zip((q, k), qk_scale, strict=True)
        )
        h = attend(q.astype(dtype), k.astype(dtype), v, segment_ids_bn, config.attention, config.sequence)
        h = self.out(constrain(h, "BNHF").reshape(x_bnd.shape))
        x_bnd = constrain((x_bnd.astype(jnp.float32) + h * gate).astype(kept), "BND")

        h = self.cross(x_bnd, text_bmd, mask_bnm, pictures, config)
        x_bnd = constrain(x_bnd + h.astype(kept), "BND")

        h = (layer_norm(x_bnd, config.epsilon) * (1 + scale_mlp) + shift_mlp).astype(dtype)
        h = self.down(jax.nn.gelu(self.up(h))).astype(jnp.float32)
        return constrain((x_bnd.astype(jnp.float32) + h * gate_mlp).astype(kept), "BND")


class Wan(nnx.Module):
    """See the module's docstring. `blocks` is one `Block` whose parameters carry a leading L axis."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs) -> None:
        D = config.width
        self.config = config
        self.patch_in = Linear(config.patch_width + config.extra_width, D, rngs=rngs)
        self.text_in = Linear(config.text_width, D, rngs=rngs)
        self.text_out = Linear(D, D, rngs=rngs)
        self.time_in = Linear(config.time_width, D, rngs=rngs)
        self.time_out = Linear(D, D, rngs=rngs)
        self.condition = Linear(D, (6, D), rngs=rngs)
        if width := config.picture_width:
            norm = lambda size: nnx.Param(jnp.stack([jnp.ones(size), jnp.zeros(size)]))
            self.picture_norm, self.picture_norm_out = norm(width), norm(D)
            self.picture_in = Linear(width, width, rngs=rngs)
            self.picture_out = Linear(width, D, rngs=rngs)
            if config.picture_positions:
                self.picture_place = nnx.Param(jnp.zeros((config.picture_positions, width)))
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.modulation = nnx.Param(jnp.zeros((2, D)))
        self.patch_out = Linear(D, config.patch_width, rngs=rngs)

    def __call__(
        self, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma, cache: StepCache | None = None
    ) -> Any:
        """Velocity of every token, float32 [B, N, P]; given a cache, that and the cache for the next evaluation.

        Args:
          patches_bnp: noisy latent patches.
          batch: everything else about the sequences; its own `patches` are not used. Coordinates count patches
            (`tokens.patches.coordinates`, "latent").
          sigma_bs: the σ of each condition; that of condition 0, of conditioning tokens, is 0.
          cache: see `models.step_cache`; None: every layer is evaluated.

        Raises:
          UserError: the mesh's `sequence` doesn't divide the positions, or its `tensor` and `sequence` the heads.
        """
        config = self.config
        x, time, given = self.embed(patches_bnp, batch, sigma_bs)

        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x, config, *given), None

        x, cache = run_layers(layer, x, self.blocks, batch.segment_ids, POLICIES[config.remat], cache)
        velocity = self.project(x, time, batch.condition_ids)
        return velocity if cache is None else (velocity, cache)

    def embed(
        self, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma
    ) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
        """What the first block takes [B,N,D], the time's embedding [B,S,D], and what every block takes beside."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        check_sequence_split(patches_bnp.shape[1], 0)
        time = self._time(sigma_bs)
        condition = self.condition(jax.nn.silu(time), "highest").astype(jnp.float32)
        # One row more, of zeros: the padding, which is every segment's.
        text = jnp.pad(batch.text, ((0, 0), (0, 1), (0, 0))).astype(dtype)
        text = constrain(self.text_out(jax.nn.gelu(self.text_in(text))), "BMD")
        mask = jnp.pad(batch.caption_mask, ((0, 0), (0, 0), (0, 1)), constant_values=True)
        angles = rotary_angles(batch.coords, config)
        x = patches_bnp
        if config.extra_channels:  # of each cell, behind its latent's
            by_cell = lambda tokens: tokens.reshape(*tokens.shape[:2], math.prod(config.patch), -1)
            x = jnp.concatenate([by_cell(x), by_cell(batch.extra_channels)], axis=-1)
            x = x.reshape(*x.shape[:2], -1)
        x = self.patch_in(x.astype(dtype))
        x = constrain(x.astype(config.stream_dtype), "BND")
        pictures = self._pictures(batch) if config.picture_width else None
        return x, time, (condition, batch.condition_ids, angles, batch.segment_ids, text, mask, pictures)

    def project(self, x_bnd: jax.Array, time_bsd: jax.Array, index_bn: jax.Array) -> Patches:
        """The velocity of what the last block gives."""
        modulation = time_bsd[:, :, None] + self.modulation[...].astype(jnp.float32)
        shift, scale = (gather_conditions(modulation[:, :, i], index_bn) for i in range(2))
        x = layer_norm(x_bnd, self.config.epsilon) * (1 + scale) + shift
        return constrain(self.patch_out(x.astype(self.config.dtype)).astype(jnp.float32), "BNP")

    def _pictures(self, batch: PackedBatch) -> Pictures:
        """The states [B,I,D] of all pictures as blocks attend to them, and which tokens do."""
        dtype = jnp.dtype(self.config.dtype)
        x = batch.pictures
        if count := self.config.picture_positions:  # every segment has so many, one segment's after another's
            x = x + self.picture_place[...][jnp.arange(x.shape[1]) % count]
        normed = lambda x, of: (layer_norm(x, PICTURE_EPSILON) * of[0] + of[1]).astype(dtype)
        x = jax.nn.gelu(self.picture_in(normed(x, self.picture_norm[...])), approximate=False)
        x = normed(self.picture_out(x), self.picture_norm_out[...])
        return constrain(x, "BMD"), batch.picture_mask

    def _time(self, sigma_bs: Sigma) -> jax.Array:
        """float32[B,S,D], of timesteps 0…1000; exact on accelerators too, as the table is small."""
        config = self.config
        steps = sigma_bs.astype(jnp.float32) * TIMESTEPS
        if config.whole_timesteps:
            steps = whole_timesteps(sigma_bs)
        if config.reference == "original" and config.whole_timesteps:
            half = config.time_width // 2
            table = np.outer(np.arange(TIMESTEPS), THETA ** (-np.arange(half) / half))
            features = jnp.asarray(np.concatenate([np.cos(table), np.sin(table)], 1), jnp.float32)[
                steps.astype(jnp.int32)
            ]
        else:
            features = timestep_features(steps, config.time_width)
        return self.time_out(jax.nn.silu(self.time_in(features, "highest")), "highest").astype(jnp.float32)


class WanPair(nnx.Module):
    """Two transformers, of high and of low noise (Wan2.2-A14B): a segment is denoised by the one of its sigma.

    The step of a packed batch runs both only where its segments are on both sides.
    """

    def __init__(self, high: Wan, low: Wan, boundary: float) -> None:
        """Both may be `models.offload.Offloaded`.

        Args:
          boundary: the timestep, as a share of 1000, from which on the first one is taken.
        """
        self.config, self.boundary = high.config, boundary
        self.offloaded = getattr(high, "offloaded", False)
        self.high, self.low = high, low

    @property
    def boundary_sigma(self) -> float:
        """The σ from which on the first one is taken, as `whole_timesteps` rounds."""
        return math.ceil(self.boundary * TIMESTEPS) / TIMESTEPS - 1e-6

    def __call__(self, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma) -> Patches:
        """As `Wan`'s."""
        is_high = whole_timesteps(sigma_bs) >= self.boundary * TIMESTEPS
        used = batch.condition_segment_ids > 0
        nothing = jnp.zeros(patches_bnp.shape, jnp.float32)

        def run(model: Wan, needed: jax.Array) -> jax.Array:
            velocity = lambda: model(patches_bnp, batch, sigma_bs).astype(jnp.float32)
            is_needed = jnp.any(needed & used)
            if self.offloaded:  # outside of jit
                return velocity() if is_needed else nothing
            return jax.lax.cond(is_needed, velocity, lambda: nothing)

        high, low = run(self.high, is_high), run(self.low, ~is_high)
        of_token = jnp.take_along_axis(is_high, batch.condition_ids, axis=1)
        return jnp.where(of_token[..., None], high, low)


def whole_timesteps(sigma: jax.Array) -> jax.Array:
    """Timesteps 0…999 of sigmas, rounded down as the originals do."""
    # 1000 σ of a σ that was k/1000 in float64 may fall short of k; σ = 1 is the last step of 999.
    return jnp.minimum(jnp.floor(sigma.astype(jnp.float32) * TIMESTEPS + 1e-3), TIMESTEPS - 1)


def rotary_angles(coords_bn5: jax.Array, config: WanConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE, two of float32[B, N, F/2], of positions counted in patches.

    The originals tabulate whole positions in float64; an angle of hundreds computed in float32 is off by 5e-5. So whole
    positions are looked up, and what a position has beyond is a small rotation more.
    """
    cosines, sines = [], []
    for axis, pairs in enumerate(config.rope_pairs):
        frequencies = THETA ** (-np.arange(pairs) / pairs)
        table = np.outer(np.arange(_LONGEST), frequencies)
        position = coords_bn5[..., axis]
        whole = jnp.floor(position)
        index = jnp.clip(whole, 0, _LONGEST - 1).astype(jnp.int32)
        cos, sin = (jnp.asarray(f(table), jnp.float32)[index] for f in (np.cos, np.sin))
        rest = (position - index)[..., None] * jnp.asarray(frequencies, jnp.float32)
        cosines.append(cos * jnp.cos(rest) - sin * jnp.sin(rest))
        sines.append(sin * jnp.cos(rest) + cos * jnp.sin(rest))
    return jnp.concatenate(cosines, -1), jnp.concatenate(sines, -1)
