"""The pieces a diffusion transformer is made of. Parameters are float32; arithmetic is in the input's dtype."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Coords


class Linear(nnx.Module):
    """x @ kernel + bias on the last axis; `scale` 0 gives a layer that begins at zero."""

    def __init__(self, width_in: int, width_out: int, scale: float = 1.0, *, rngs: nnx.Rngs) -> None:
        std = scale / math.sqrt(width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None = None, epsilon: float = 1e-6) -> jax.Array:
    """Divides the last axis by its root mean square, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 if scale is None else x32 * scale).astype(x.dtype)


def fourier(value: jax.Array, width: int, longest: float = 1.0, shortest: float = 1e-3) -> jax.Array:
    """Sines and cosines of a scalar at `width`/2 periods spaced geometrically: [...] → [..., width]."""
    angles = value[..., None] * frequencies(width // 2, longest, shortest)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def frequencies(count: int, longest: float, shortest: float) -> jax.Array:
    """`count` angular frequencies whose periods fall geometrically from `longest` to `shortest`."""
    return 2 * math.pi / jnp.geomspace(longest, shortest, count)


def rotary_angles(
    coords_bn5: Coords, head_width: int, periods: tuple[tuple[float, float], tuple[float, float]]
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of 3-D rotary embedding (Su et al. 2021): [B, N, 5] → two of [B, N, F/2].

    Args:
      coords_bn5: time, y, x come first; what follows is not turned by.
      head_width: F; a quarter of its pairs turn with time (rounded), the rest with y and x equally.
      periods: (longest, shortest) period for time and for space, in the coordinates' own units.
    """
    pairs = head_width // 2
    space = (3 * pairs // 4) // 2
    (long_time, short_time), (long_space, short_space) = periods
    in_time = coords_bn5[..., :1] * frequencies(pairs - 2 * space, long_time, short_time)
    in_space = [coords_bn5[..., i : i + 1] * frequencies(space, long_space, short_space) for i in (1, 2)]
    angles = jnp.concatenate([in_time, *in_space], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bnhf: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (f, f + F/2) of every head by its angle."""
    cos, sin = (a[:, :, None, :].astype(x_bnhf.dtype) for a in angles)
    a, b = jnp.split(x_bnhf, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@jax.custom_vjp
def permute(x_bnd: jax.Array, order_bn: jax.Array, inverse_bn: jax.Array) -> jax.Array:
    """x[order] in each row; `inverse` undoes it, and brings the gradient back: a gather's own is a slow scatter."""
    return jnp.take_along_axis(x_bnd, order_bn[..., None], axis=1)


def _permute_forward(x, order, inverse):
    return permute(x, order, inverse), (order, inverse)


def _permute_backward(kept, pulled):
    order, inverse = kept
    return permute(pulled, inverse, order), None, None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def gather_conditions(table_bsd: jax.Array, index_bn: jax.Array) -> jax.Array:
    """Row of the table for each token, [B,S,D] and [B,N] → [B,N,D].

    Its gradient is a product with a one-hot matrix: S is small, and a gather's own is a slow scatter.
    """
    return jnp.take_along_axis(table_bsd, index_bn[..., None], axis=1)


def _gather_forward(table, index):
    return gather_conditions(table, index), (index, table[..., :0])


def _gather_backward(kept, pulled):
    index, empty = kept
    hot = jax.nn.one_hot(index, empty.shape[1], dtype=pulled.dtype)
    return jnp.einsum("bns,bnd->bsd", hot, pulled), None


gather_conditions.defvjp(_gather_forward, _gather_backward)
