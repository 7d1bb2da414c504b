"""LTX-Video's transformer (HaCohen et al. 2024, arXiv:2501.00103) on packed sequences: a timestep per condition.

The same call as `models.dit.DiT`. What differs from it: captions, after an MLP that all layers share, reach the tokens
by cross-attention alone, without norm or gate; norms of the residual stream have no weights; queries and keys are
normalized over all heads together; the modulation of adaLN-Zero is a table of each layer plus one projection that
layers share; RoPE runs over the whole width, so each head has frequencies of its own, on positions in seconds and
pixels. A token is one latent cell.

Arithmetic is that of diffusers' LTXVideoTransformer3DModel, which serves versions 0.9.0 to 0.9.8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.axes import Patches, SegmentIds, Sigma
from sora_jax.distributed.mesh import HEADS, check_sequence_split, constrain
from sora_jax.errors import UserError
from sora_jax.models.attention.dispatch import attend, attend_masked
from sora_jax.models.dit_config import POLICIES, Backend
from sora_jax.models.layers import (
    Linear,
    gather_conditions,
    layer_norm,
    norm_heads,
    rms_norm,
    rotate,
    timestep_features,
)
from sora_jax.models.step_cache import StepCache, run_layers
from sora_jax.tokens.packing import PackedBatch
from sora_jax.tokens.patches import CoordinateMode

TIMESTEPS = 1000  # a sigma of 1
THETA = 10_000.0  # of RoPE
EXTENT = (20.0, 2048.0, 2048.0)  # seconds, pixels down and to the right that RoPE's slowest waves span
TIME_WIDTH = 256  # numbers of the timestep's features
QK_EPSILON = 1e-5  # whatever the config says of other norms


@dataclasses.dataclass(frozen=True)
class LTXConfig:
    """Shape of the transformer; names of diffusers' `transformer/config.json` in brackets.

    Attributes:
      layers, heads, head_width: [num_layers, num_attention_heads, attention_head_dim].
      channels, channels_out: of the latent, and of the velocity [in_channels, out_channels].
      text_width: of the text encoder's states [caption_channels].
      epsilon: of the residual stream's norms [norm_eps].
      cell: what a latent cell spans: video frames, pixels of height and of width; the autoencoder's compression.
      conditional: whether it is used as by LTXConditionPipeline (0.9.5 and later). A latent frame is then at the time
        of the first of the video frames that it shows, not of the last; a clip's first is at 0 in both. And given
        frames after the clip's first stand beside it, as tokens of their own (`tokens.canvas.Canvas.beside`).
      dtype: of the arithmetic; norms, modulation, softmax and the residual stream's sums are float32.
      remat, attention, sequence: as `models.dit_config.DiTConfig`.
    """

    layers: int = 28
    heads: int = 32
    head_width: int = 64
    channels: int = 128
    channels_out: int = 128
    text_width: int = 4096
    epsilon: float = 1e-6
    cell: tuple[int, int, int] = (8, 32, 32)
    conditional: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    remat: Literal["all", "dots", "none"] = "all"
    attention: Backend = "auto"
    sequence: Literal["heads", "ring"] = "heads"

    # What pipelines ask of a transformer's configuration.
    patch: tuple[int, int, int] = dataclasses.field(default=(1, 1, 1), init=False, repr=False)
    coords: CoordinateMode = dataclasses.field(default="absolute", init=False, repr=False)
    flow_map: bool = dataclasses.field(default=False, init=False, repr=False)
    reference_frames: bool = dataclasses.field(default=False, init=False, repr=False)
    extra_channels: int = dataclasses.field(default=0, init=False, repr=False)
    extra_width: int = dataclasses.field(default=0, init=False, repr=False)
    picture_width: int = dataclasses.field(default=0, init=False, repr=False)
    caption: Literal["cross"] = dataclasses.field(default="cross", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.head_width % 2 or self.width < 6:
            raise UserError(
                f"LTX-Video's heads are of an even width, and six or more together, not {self.heads} of "
                f"{self.head_width}."
            )
        if self.channels_out != self.channels:
            raise UserError(
                f"This transformer takes {self.channels} channels and gives {self.channels_out}: such models of "
                "LTX-Video aren't supported."
            )

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_width

    @property
    def hidden(self) -> int:
        """W, of an MLP."""
        return 4 * self.width

    @property
    def patch_width(self) -> int:
        """P, numbers a token holds."""
        return self.channels

    @property
    def heads_over(self) -> tuple[str, ...]:
        """The axes of a mesh that must divide the heads, together."""
        return ("tensor",) if self.sequence == "ring" else HEADS

    @property
    def stream_dtype(self) -> str:
        """Of the residual stream."""
        return self.dtype

    def text_positions(self, text_len: int) -> int:
        """Of so many text positions, how many are in the sequence that self-attention sees: none."""
        return 0


class CrossAttention(nnx.Module):
    """From a token to its active caption."""

    def __init__(self, config: LTXConfig, *, rngs: nnx.Rngs) -> None:
        D, heads = config.width, (config.heads, config.head_width)
        self.q = Linear(D, heads, letters="DHF", rngs=rngs)
        self.kv = Linear(D, (2, *heads), letters="D2HF", rngs=rngs)
        self.qk_scale = nnx.Param(jnp.ones((2, *heads)))
        self.out = Linear(D, D, letters="WD", rngs=rngs)

    def __call__(self, x_bnd: jax.Array, text_bmd: jax.Array, mask_bnm: jax.Array) -> jax.Array:
        """What the residual stream gains, [B, N, D]."""
        scale = self.qk_scale[...]
        q = norm_heads(constrain(self.q(x_bnd), "BNHF"), scale[0], QK_EPSILON)
        k, v = (constrain(x.squeeze(2), "BMHF") for x in jnp.split(self.kv(text_bmd), 2, axis=2))
        h = attend_masked(q, norm_heads(k, scale[1], QK_EPSILON), v, mask_bnm)
        return self.out(constrain(h, "BNHF").reshape(x_bnd.shape))


class Block(nnx.Module):
    """Self-attention and an MLP, each x + gate · f(norm(x) · (1 + scale) + shift), cross-attention between them."""

    def __init__(self, config: LTXConfig, *, rngs: nnx.Rngs) -> None:
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
        config: LTXConfig,
        condition_bs6d: jax.Array,
        index_bn: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_bn: SegmentIds,
        text_bmd: jax.Array,
        mask_bnm: jax.Array,
    ) -> jax.Array:
        dtype = x_bnd.dtype
        modulation = condition_bs6d + self.modulation[...].astype(jnp.float32)
        # One by one: a gather that its only use takes in is never written to memory.
        of_tokens = lambda i: gather_conditions(modulation[:, :, i], index_bn)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = map(of_tokens, range(6))
        norm = lambda x: rms_norm(x.astype(jnp.float32), epsilon=config.epsilon)

        h = (norm(x_bnd) * (1 + scale) + shift).astype(dtype)
        q, k, v = (constrain(x.squeeze(2), "BNHF") for x in jnp.split(self.qkv(h), 3, axis=2))
        q, k = (
            constrain(rotate(norm_heads(x, own, QK_EPSILON).astype(jnp.float32), angles), "BNHF").astype(
                dtype
            )
            for x, own in zip((q, k), self.qk_scale[...], strict=True)
        )
        h = attend(q, k, v, segment_ids_bn, config.attention, config.sequence)
        h = self.out(constrain(h, "BNHF").reshape(x_bnd.shape))
        x_bnd = constrain((x_bnd.astype(jnp.float32) + h * gate).astype(dtype), "BND")

        x_bnd = constrain(x_bnd + self.cross(x_bnd, text_bmd, mask_bnm), "BND")

        h = (norm(x_bnd) * (1 + scale_mlp) + shift_mlp).astype(dtype)
        h = self.down(jax.nn.gelu(self.up(h))).astype(jnp.float32)
        return constrain((x_bnd.astype(jnp.float32) + h * gate_mlp).astype(dtype), "BND")


class LTX(nnx.Module):
    """See the module's docstring. `blocks` is one `Block` whose parameters carry a leading L axis."""

    def __init__(self, config: LTXConfig, *, rngs: nnx.Rngs) -> None:
        D = config.width
        self.config = config
        self.patch_in = Linear(config.patch_width, D, rngs=rngs)
        self.text_in = Linear(config.text_width, D, rngs=rngs)
        self.text_out = Linear(D, D, rngs=rngs)
        self.time_in = Linear(TIME_WIDTH, D, rngs=rngs)
        self.time_out = Linear(D, D, rngs=rngs)
        self.condition = Linear(D, (6, D), rngs=rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.modulation = nnx.Param(jnp.zeros((2, D)))
        self.patch_out = Linear(D, config.patch_width, rngs=rngs)

    def __call__(
        self, patches_bnp: Patches, batch: PackedBatch, sigma_bs: Sigma, cache: StepCache | None = None
    ) -> Any:
        """Velocity of every token, float32 [B, N, P]; given a cache, that and the cache for the next evaluation.

        Args:
          patches_bnp: noisy latent patches, of one cell each.
          batch: everything else about the sequences; its own `patches` are not used. Coordinates are those of
            `tokens.patches.coordinates`, "absolute", with `frames_per_latent=config.cell[0]`: seconds, then cells
            down and to the right.
          sigma_bs: the σ of each condition; that of condition 0, of conditioning tokens, is 0. The timestep is 1000 σ.
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
        features = timestep_features(sigma_bs.astype(jnp.float32) * TIMESTEPS, TIME_WIDTH)
        # Exact on accelerators too, as the table is small.
        time = self.time_out(jax.nn.silu(self.time_in(features, "highest")), "highest").astype(jnp.float32)
        condition = self.condition(jax.nn.silu(time), "highest").astype(jnp.float32)
        text = jax.nn.gelu(self.text_in(jnp.asarray(batch.text).astype(dtype)))
        text = constrain(self.text_out(text), "BMD")
        angles = rotary_angles(batch.coords, config)
        x = constrain(self.patch_in(patches_bnp.astype(dtype)), "BND")
        return x, time, (condition, batch.condition_ids, angles, batch.segment_ids, text, batch.caption_mask)

    def project(self, x_bnd: jax.Array, time_bsd: jax.Array, index_bn: jax.Array) -> Patches:
        """The velocity of what the last block gives."""
        modulation = time_bsd[:, :, None] + self.modulation[...].astype(jnp.float32)
        shift, scale = (gather_conditions(modulation[:, :, i], index_bn) for i in range(2))
        x = layer_norm(x_bnd, 1e-6) * (1 + scale) + shift
        return constrain(self.patch_out(x.astype(self.config.dtype)).astype(jnp.float32), "BNP")


def rotary_angles(coords_bn5: jax.Array, config: LTXConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE, two of float32[B, N, H, F/2].

    Time, y and x, each of `EXTENT` mapped to [−1, 1], take turns by frequency, from π/2 to 10⁴ π/2. The pairs that
    three axes leave over are in front and don't rotate. Angles are float32, as the original's: those of the highest
    frequencies are off by 0.003, and the model was trained with that.
    """
    coords = jnp.asarray(coords_bn5, jnp.float32)
    time = coords[..., 0]
    if config.conditional:
        # The span ends with the last frame, and begins after the last frame before.
        time = time - coords[..., 3] * ((config.cell[0] - 1) / config.cell[0])
    position = jnp.stack(
        [
            time / EXTENT[0],
            coords[..., 1] * config.cell[1] / EXTENT[1],
            coords[..., 2] * config.cell[2] / EXTENT[2],
        ],
        axis=-1,
    )
    angles = (position * 2 - 1)[..., None, :] * frequencies(config.width // 6)[:, None]
    angles = angles.reshape(*angles.shape[:2], -1)
    spare = config.width // 2 - angles.shape[-1]
    angles = jnp.pad(angles, ((0, 0), (0, 0), (spare, 0)))
    angles = angles.reshape(*angles.shape[:2], config.heads, config.head_width // 2)
    return constrain(jnp.cos(angles), "BNHF"), constrain(jnp.sin(angles), "BNHF")


@functools.cache
def frequencies(count: int) -> np.ndarray:
    """float32[count], from π/2 to 10⁴ π/2 geometrically, rounded as PyTorch's `linspace` and powers round."""
    step, i = np.float64(np.float32(1) / np.float32(max(count - 1, 1))), np.arange(count)
    exponents = np.where(i < count // 2, step * i, 1 - step * (count - 1 - i)).astype(np.float32)
    powers = (THETA ** exponents.astype(np.float64)).astype(np.float32)
    return powers * np.float32(math.pi) / np.float32(2)
