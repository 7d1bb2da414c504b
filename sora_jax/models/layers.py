"""The pieces a diffusion transformer is made of. Parameters are float32; arithmetic is in the input's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.axes import Coords, Heads
from sora_jax.distributed.mesh import constrain, gather_kernel, platform


class Linear(nnx.Module):
    """x @ kernel + bias on the last axis; `scale` 0 gives a layer that begins at zero.

    Args:
      width_out: of the result, or the sizes of several axes that take the last one's place.
      letters: the axes of the kernel as it is used, such as "DW"; see `mesh.LETTER_AXES`. A digit after the first says
        that the kernel is so many matrices beside each other.

    `models.low_rank.with_lora` adds a low-rank update (Hu et al. 2021): `lora_down` [in, rank], `lora_up` [rank, out],
    and the number `lora_factor`; of several matrices beside each other every one has its own, [in, parts · rank] and
    [parts · rank, out / parts]. `models.int8` makes the kernel int8 and adds `kernel_scale`, float32[out], a factor of
    each column.
    """

    kernel_scale: nnx.Param
    lora_down: nnx.Param
    lora_up: nnx.Param
    lora_factor: float

    def __init__(
        self,
        width_in: int,
        width_out: int | tuple[int, ...],
        scale: float = 1.0,
        letters: str = "",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.out = (width_out,) if isinstance(width_out, int) else width_out
        self.letters = letters or "D" * (1 + len(self.out))
        width = math.prod(self.out)
        std = scale / math.sqrt(width_in)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (width_in, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    @property
    def parts(self) -> int:
        """How many matrices the kernel is, beside each other."""
        return self.out[0] if self.letters[1].isdigit() else 1

    def __call__(
        self,
        x: jax.Array,
        precision: str | None = None,
        before: Callable[[jax.Array], jax.Array] | None = None,
        after: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Projects the last axis.

        Args:
          x: [..., width_in].
          precision: "highest" keeps a float32 product exact on accelerators too; for small tables.
          before, after: linear maps of the last axis that x and the result pass. They are applied to the parameters
            instead, in float32, so they cost no pass over the data; `before` must be symmetric. Not with int8 kernels.
        """
        kernel, bias = self.kernel[...], self.bias[...]
        if before is not None:
            kernel = before(kernel.mT).mT
        if after is not None:
            kernel, bias = after(kernel), after(bias)
        # Gathered from its shards in x's type, half the bytes in bfloat16, or as int8.
        bias = constrain(bias.astype(x.dtype).reshape(self.out), self.letters[1:])
        if hasattr(self, "kernel_scale"):
            kernel = gather_kernel(kernel, (-1, *self.out), self.letters).astype(x.dtype)
            scale = constrain(self.kernel_scale[...].reshape(self.out), self.letters[1:])
            # Sums of products with numbers up to 127 are more than float16 holds.
            y = jnp.tensordot(x, kernel, 1, precision=precision, preferred_element_type=jnp.float32)
            y = (y * scale).astype(x.dtype) + bias
        else:
            kernel = gather_kernel(kernel.astype(x.dtype), (-1, *self.out), self.letters)
            y = jnp.tensordot(x, kernel, 1, precision=precision) + bias
        return y + self._low_rank(x).reshape(y.shape) if hasattr(self, "lora_down") else y

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """factor · (x @ down) @ up, [..., parts, numbers of a part]."""
        parts, letters = self.parts, self.letters[1:] if self.parts == 1 else self.letters[2:]
        down, up = self.lora_down[...].astype(x.dtype), self.lora_up[...].astype(x.dtype)
        down = gather_kernel(down, (len(down), parts, -1), f"{self.letters[0]}PR")
        up = constrain(up.reshape(parts, down.shape[-1], *self.out[-len(letters) :]), f"PR{letters}")
        h = self.lora_factor * jnp.tensordot(x, down, 1)
        return jnp.einsum("...pr,prk->...pk", h, up.reshape(*up.shape[:2], -1))


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """The linear layers of a model by path, such as "blocks/cross/kv"."""
    found: dict[str, Linear] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if not name.endswith("/kernel"):
            continue
        layer: Any = model
        for step in name.removesuffix("/kernel").split("/"):
            layer = layer[int(step)] if step.isdigit() else getattr(layer, step)
        if isinstance(layer, Linear):
            found[name.removesuffix("/kernel")] = layer
    return found


def rms_norm(x: jax.Array, scale: jax.Array | None = None, epsilon: float = 1e-6) -> jax.Array:
    """Divides the last axis by its root mean square, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 if scale is None else x32 * scale).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Over the last axis, without weights: float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def norm_heads(x_bnhf: jax.Array, scale_hf: jax.Array, epsilon: float) -> jax.Array:
    """Root mean square norm over all heads together, in x's type."""
    flat = x_bnhf.reshape(*x_bnhf.shape[:2], -1)
    return rms_norm(flat, scale_hf.reshape(-1).astype(jnp.float32), epsilon).reshape(x_bnhf.shape)


def timestep_features(steps: jax.Array, width: int) -> jax.Array:
    """Cosines, then sines, of a timestep of 0…1000 at periods from 2π to 2π·10⁴: [...] → float32[..., width].

    As DDPM's code and diffusers have them: the last period is one step short of 10⁴.
    """
    half = width // 2
    angles = steps[..., None] * jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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
      coords_bn5: time, y, x come first; the rest is not used.
      head_width: F; a quarter of its pairs rotate with time (rounded), the rest with y and x equally.
      periods: (longest, shortest) period for time and for space, in the coordinates' own units.
    """
    pairs = head_width // 2
    space = (3 * pairs // 4) // 2
    (long_time, short_time), (long_space, short_space) = periods
    in_time = coords_bn5[..., :1] * frequencies(pairs - 2 * space, long_time, short_time)
    in_space = [coords_bn5[..., i : i + 1] * frequencies(space, long_space, short_space) for i in (1, 2)]
    angles = jnp.concatenate([in_time, *in_space], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bnhf: Heads, angles: tuple[jax.Array, jax.Array]) -> Heads:
    """Rotates each pair (f, f + F/2) of every head by its angle: [B, N, F/2] for all heads, [B, N, H, F/2] its own."""
    cos, sin = ((a if a.ndim == 4 else a[:, :, None, :]).astype(x_bnhf.dtype) for a in angles)
    a, b = jnp.split(x_bnhf, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _take(x_bmd: jax.Array, index_bn: jax.Array) -> jax.Array:
    # Without the promise XLA masks indices out of bounds in a second pass over the result.
    return jnp.take_along_axis(x_bmd, index_bn[..., None], axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def gather_positions(x_bmd: jax.Array, index_bn: jax.Array, inverse_bm: jax.Array) -> jax.Array:
    """x[index] in each sequence, [B,M,D] → [B,N,D].

    Its gradient is a gather too, by `inverse` (the position of N that took each of M; below 0: none), as a gather's own
    is a slow scatter.
    """
    return _take(x_bmd, index_bn)


def _gather_positions_forward(x, index, inverse):
    return gather_positions(x, index, inverse), inverse


def _gather_positions_backward(inverse, d_out):
    there = _take(d_out, jnp.maximum(inverse, 0))
    return jnp.where((inverse >= 0)[..., None], there, 0), None, None


gather_positions.defvjp(_gather_positions_forward, _gather_positions_backward)


@jax.custom_vjp
def gather_conditions(table_bsd: jax.Array, index_bn: jax.Array) -> jax.Array:
    """The condition's value for each token, [B,S,D] and [B,N] → [B,N,D].

    Its gradient is a product with a one-hot matrix: S is small, and a gather's own is a slow scatter. On TPUs the
    forward pass is such a product too: exact, as one term of each sum isn't 0, and less memory traffic
    (experiments/LOG.md).
    """
    if platform() == "tpu":
        return jnp.einsum("bns,bsd->bnd", _one_hot(index_bn, table_bsd), table_bsd, precision="highest")
    return _take(table_bsd, index_bn)


def _gather_forward(table, index):
    return gather_conditions(table, index), (index, table[..., :0])


def _gather_backward(residuals, d_out):
    index, empty = residuals
    chosen = _one_hot(index, empty).astype(d_out.dtype)
    return jnp.einsum("bns,bnd->bsd", chosen, d_out, precision="highest"), None


def _one_hot(index_bn: jax.Array, table_bsd: jax.Array) -> jax.Array:
    return jax.nn.one_hot(index_bn, table_bsd.shape[1], dtype=table_bsd.dtype)


gather_conditions.defvjp(_gather_forward, _gather_backward)
