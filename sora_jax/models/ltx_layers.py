"""Layers of LTX-Video's autoencoders, channels last; what a causal one keeps between chunks is `conv.ConvCache`'s.

Each takes a cache, or None where it isn't causal: frames before the first are then its copies, and those after the last
are the last's. Modules are called as diffusers calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.distributed.mesh import constrain
from sora_jax.models.conv import ConvCache, Stride, causal_conv, frame_conv, time_taps
from sora_jax.models.layers import Linear, layer_norm, rms_norm, timestep_features
from sora_jax.models.ltx_vae_config import Down, Up

FEATURES = 256  # numbers of a timestep
EPSILON = 1e-8  # of norms without weights

# Of so many rows and columns, standard normal numbers [Y, X] for the next layer that adds noise.
Noise = Callable[[int, int], jax.Array]


class Kernel(nnx.Module):
    """The parameters of a convolution."""

    def __init__(self, sides: Stride, width_in: int, width_out: int, *, rngs: nnx.Rngs) -> None:
        std = 1 / math.sqrt(math.prod(sides) * width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*sides, width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))


class Conv(nnx.Module):
    """A 3×3×3 convolution, or a product with a matrix; zeros around frames, copies before and after them."""

    def __init__(
        self, width_in: int, width_out: int, side: int = 3, strided: bool = False, *, rngs: nnx.Rngs
    ) -> None:
        self.strided = strided
        self.conv = Kernel((side,) * 3, width_in, width_out, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache | None) -> jax.Array:
        kernel = constrain(self.conv.kernel[...].astype(x.dtype), "TYXCC")
        bias = self.conv.bias[...].astype(x.dtype)
        if kernel.shape[0] == 1:
            return x @ kernel[0, 0, 0] + bias
        if self.strided:
            return self._every_second(x, kernel, cache) + bias
        x = _with_neighbours(x) if cache is None else cache.extend(x, 2, repeat=True)
        return causal_conv(x, kernel) + bias

    def _every_second(self, x: jax.Array, kernel: jax.Array, cache: ConvCache | None) -> jax.Array:
        """At every second place of time, height and width, from the first on."""
        if cache is None:
            x = _with_neighbours(x)
        else:
            # The next chunk begins a place after this one's last frame, which is the first of three there.
            first = cache.first
            x = cache.extend(x, 1, repeat=True)
            if first:
                x = jnp.concatenate([x[:, :1], x], axis=1)
        flat = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, -1, kernel.shape[-1])
        return frame_conv(time_taps(x, 2), flat, (2, 2), ((1, 1), (1, 1)))


def _with_neighbours(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1)


def fold(x: jax.Array, stride: Stride) -> jax.Array:
    """Cells as channels, in the order (C, T, Y, X): [B,T,Y,X,C] → [B,T/a,Y/b,X/c,C·abc]."""
    (B, T, Y, X, C), (a, b, c) = x.shape, stride
    x = x.reshape(B, T // a, a, Y // b, b, X // c, c, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, T // a, Y // b, X // c, C * a * b * c)


def unfold(x: jax.Array, stride: Stride) -> jax.Array:
    """The inverse of `fold`."""
    (B, T, Y, X, C), (a, b, c) = x.shape, stride
    x = x.reshape(B, T, Y, X, C // (a * b * c), a, b, c).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, T * a, Y * b, X * c, -1)


class LayerNorm(nnx.Module):
    """Over channels, with weights."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (layer_norm(x, self.epsilon) * self.weight[...] + self.bias[...]).astype(x.dtype)


class TimestepEmbedder(nnx.Module):
    """Timesteps to the numbers that residual blocks add to their own tables."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = Linear(FEATURES, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)

    def __call__(self, timestep_b: jax.Array) -> jax.Array:
        """float32[B,width]."""
        features = timestep_features(timestep_b.astype(jnp.float32), FEATURES)
        return self.linear_2(jax.nn.silu(self.linear_1(features, "highest")), "highest")


class TimeEmbedder(nnx.Module):
    """One more level of names."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.timestep_embedder = TimestepEmbedder(width, rngs=rngs)

    def __call__(self, timestep_b: jax.Array) -> jax.Array:
        return self.timestep_embedder(timestep_b)


def modulate(x: jax.Array, table_bnc: jax.Array, place: int) -> jax.Array:
    """x · (1 + scale) + shift, where the table's row `place` is the shift and the next one the scale."""
    shift, scale = (table_bnc[:, place + i, None, None, None] for i in (0, 1))
    return (x * (1 + scale) + shift).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm x))))); x normalised and through a matrix where the widths differ.

    With `timed` norms are followed by a scale and a shift; with `noisy` convolutions by noise, the same for all frames
    and, but for a factor, all channels.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        epsilon: float,
        timed: bool = False,
        noisy: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = Conv(width_in, width_out, rngs=rngs)
        self.conv2 = Conv(width_out, width_out, rngs=rngs)
        other = width_in != width_out
        self.norm3 = LayerNorm(width_in, epsilon) if other else None
        self.conv_shortcut = Conv(width_in, width_out, 1, rngs=rngs) if other else None
        self.per_channel_scale1 = nnx.Param(jnp.zeros(width_in)) if noisy else None
        self.per_channel_scale2 = nnx.Param(jnp.zeros(width_in)) if noisy else None
        self.scale_shift_table = nnx.Param(jnp.zeros((4, width_in))) if timed else None

    def __call__(
        self,
        x: jax.Array,
        cache: ConvCache | None,
        time_bc: jax.Array | None = None,
        noise: Noise | None = None,
    ) -> jax.Array:
        table = None
        if self.scale_shift_table is not None and time_bc is not None:
            own = self.scale_shift_table[...]
            table = time_bc.reshape(-1, *own.shape) + own
        h, layers = x, ((self.conv1, self.per_channel_scale1), (self.conv2, self.per_channel_scale2))
        for i, (conv, scale) in enumerate(layers):
            h = rms_norm(h, epsilon=EPSILON)
            if table is not None:
                h = modulate(h, table, 2 * i)
            h = conv(jax.nn.silu(h), cache)
            if scale is not None and noise is not None:
                h = h + (noise(*h.shape[2:4])[..., None] * scale[...]).astype(h.dtype)
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x), cache)
        return x + h


class MiddleBlock(nnx.Module):
    """Residual blocks, of one width."""

    def __init__(
        self,
        width: int,
        blocks: int,
        epsilon: float,
        timed: bool = False,
        noisy: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.time_embedder = TimeEmbedder(4 * width, rngs=rngs) if timed else None
        self.resnets = nnx.List(
            [ResidualBlock(width, width, epsilon, timed, noisy, rngs=rngs) for _ in range(blocks)]
        )

    def __call__(
        self,
        x: jax.Array,
        cache: ConvCache | None,
        timestep_b: jax.Array | None = None,
        noise: Noise | None = None,
    ) -> jax.Array:
        time = None
        if self.time_embedder is not None and timestep_b is not None:
            time = self.time_embedder(timestep_b)
        for block in self.resnets:
            x = block(x, cache, time, noise)
        return x


class Downsampler(nnx.Module):
    """A convolution whose cells are folded into channels, and means of what came in beside it.

    Where time is halved a clip's first frame is alone: a copy is before it.
    """

    def __init__(self, down: Down, stride: Stride, *, rngs: nnx.Rngs) -> None:
        self.stride, self.width = stride, down.width_out
        self.conv = Conv(down.width_in, down.width_out // math.prod(stride), rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache | None) -> jax.Array:
        if cache is None or cache.first:
            x = jnp.concatenate([x[:, : self.stride[0] - 1], x], axis=1)
        short = fold(x, self.stride)
        short = short.reshape(*short.shape[:-1], self.width, -1).mean(axis=-1)
        return fold(self.conv(x, cache), self.stride) + short


class DownStage(nnx.Module):
    """See `Down`."""

    def __init__(self, down: Down, epsilon: float, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List(
            [ResidualBlock(down.width_in, down.width_in, epsilon, rngs=rngs) for _ in range(down.blocks)]
        )
        samplers: list[nnx.Module] = []
        if down.stride is not None and down.folded:
            samplers = [Downsampler(down, down.stride, rngs=rngs)]
        elif down.stride is not None:
            samplers = [Conv(down.width_in, down.width_in, strided=True, rngs=rngs)]
        self.downsamplers = nnx.List(samplers)
        self.conv_out = (
            ResidualBlock(down.width_in, down.width_out, epsilon, rngs=rngs) if down.widened else None
        )

    def __call__(self, x: jax.Array, cache: ConvCache | None) -> jax.Array:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x, cache)
        return x if self.conv_out is None else self.conv_out(x, cache)


class Upsampler(nnx.Module):
    """A convolution whose channels are unfolded into twice the frames and sides, but for a clip's first frame."""

    def __init__(self, up: Up, *, rngs: nnx.Rngs) -> None:
        self.repeats = 8 // up.factor if up.residual else 0
        width = up.width_out * up.factor
        self.conv = Conv(width, 8 * up.width_out, rngs=rngs)

    def __call__(self, x: jax.Array, cache: ConvCache | None) -> jax.Array:
        new = unfold(self.conv(x, cache), (2, 2, 2))
        if self.repeats:
            new = new + jnp.tile(unfold(x, (2, 2, 2)), self.repeats)
        return new[:, 1:] if cache is None or cache.first else new


class UpStage(nnx.Module):
    """See `Up`."""

    def __init__(self, up: Up, epsilon: float, timed: bool, *, rngs: nnx.Rngs) -> None:
        widths = up.width_in, up.width_out
        self.conv_in = ResidualBlock(*widths, epsilon, rngs=rngs) if widths[0] != widths[1] else None
        self.time_embedder = TimeEmbedder(4 * up.width_in, rngs=rngs) if timed else None
        self.upsamplers = nnx.List([Upsampler(up, rngs=rngs)] if up.upsampled else [])
        width = up.width_out
        self.resnets = nnx.List(
            [ResidualBlock(width, width, epsilon, timed, up.noisy, rngs=rngs) for _ in range(up.blocks)]
        )

    def __call__(
        self,
        x: jax.Array,
        cache: ConvCache | None,
        timestep_b: jax.Array | None = None,
        noise: Noise | None = None,
    ) -> jax.Array:
        if self.conv_in is not None:
            x = self.conv_in(x, cache)
        time = None
        if self.time_embedder is not None and timestep_b is not None:
            time = self.time_embedder(timestep_b)
        for upsampler in self.upsamplers:
            x = upsampler(x, cache)
        for block in self.resnets:
            x = block(x, cache, time, noise)
        return x
