"""What frozen networks are made of: convolutions with their normalization folded in, pooling, resizing.

A network is a function of its weights, a dict of arrays by name, and of frames [B, (T,) Y, X, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError

Weights: TypeAlias = dict[str, jax.Array]
Tensors: TypeAlias = Mapping[str, np.ndarray]  # as they are in files
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv(weights: Weights, name: str, x: jax.Array, stride: int = 1, padding: Padding = "SAME") -> jax.Array:
    """Convolution of x[B,...,C] with `name.kernel` [...,C,D], and `name.bias` [D] added where there is one.

    Args:
      weights: the network's.
      name: the layer's.
      x: of as many axes in time and space as the kernel.
      stride: along each of these.
      padding: "SAME" is TensorFlow's, which pads more at the end; a number is added on all sides.
    """
    kernel = weights[f"{name}.kernel"]
    space = kernel.ndim - 2
    letters = "THW"[-space:]
    if isinstance(padding, int):
        padding = [(padding, padding)] * space
    x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * space,
        padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision="highest",
    )
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def depthwise(weights: Weights, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution of x[B,Y,X,C] with `name.kernel` [K,K,1,C], channel by channel, padded as "SAME".

    Weighted sums of shifted frames: with XLA's own grouped convolutions all of EfficientNet takes four times as long on
    CPUs.
    """
    kernel = weights[f"{name}.kernel"]
    side, sizes = len(kernel), x.shape[1:3]
    outs = [-(-size // stride) for size in sizes]
    pads = [max((out - 1) * stride + side - size, 0) for size, out in zip(sizes, outs, strict=True)]
    padded = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    total = jnp.zeros((len(x), *outs, x.shape[-1]))
    for i in range(side):
        for k in range(side):
            ends = (i + (outs[0] - 1) * stride + 1, k + (outs[1] - 1) * stride + 1)
            total += padded[:, i : ends[0] : stride, k : ends[1] : stride] * kernel[i, k, 0]
    return total + weights[f"{name}.bias"]


def max_pool(
    x: jax.Array,
    window: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> jax.Array:
    """The largest number of each window of x[B,...,C]."""
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), pads)


def mean_pool(x: jax.Array, window: Sequence[int], padding: str = "VALID") -> jax.Array:
    """The mean of each window of x[B,...,C] at stride 1; what "SAME" pads isn't counted."""
    ones = (1,) * len(window)

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, *window, 1), (1, *ones, 1), padding)

    return total(x) / total(jnp.ones_like(x[:1, ..., :1]))


def resize(
    x: jax.Array, height: int, width: int, method: str = "bilinear", antialias: bool = False
) -> jax.Array:
    """Frames f[B,Y,X,C] at height x width: pixels' centres stay where they are (PyTorch's align_corners=False)."""
    if x.shape[1:3] == (height, width):
        return x
    return jax.image.resize(x, (len(x), height, width, x.shape[-1]), method, antialias=antialias)


def resize_and_crop(x: jax.Array, size: int, method: str = "bilinear", antialias: bool = False) -> jax.Array:
    """Frames whose short side becomes `size`, cropped in the middle to size x size."""
    _, height, width, _ = x.shape
    short = min(height, width)
    x = resize(x, max(size, height * size // short), max(size, width * size // short), method, antialias)
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    return x[:, top : top + size, left : left + size]


def normalize(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Pixels of 0..255 to 0..1, without a channel's mean, in its standard deviations."""
    return (x / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def kernel_of(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's [D,C,...] as [...,C,D]."""
    return np.moveaxis(tensor, (0, 1), (-1, -2)).astype(np.float32)


def fold_norm(
    kernel: np.ndarray,
    scale: np.ndarray | None,
    shift: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    epsilon: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(kernel, bias) of a convolution followed by a batch normalization, in float64 until the end."""
    factor = 1 / np.sqrt(var.ravel().astype(np.float64) + epsilon)
    factor = factor if scale is None else factor * scale.ravel()
    bias = shift.ravel() - mean.ravel() * factor
    return (kernel * factor).astype(np.float32), bias.astype(np.float32)


def folded(tensors: Tensors, conv_name: str, norm_name: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """`fold_norm` of PyTorch's modules of these names."""
    kernel = kernel_of(tensors[f"{conv_name}.weight"])
    names = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, var = (tensors[f"{norm_name}.{part}"] for part in names)
    return fold_norm(kernel, scale, shift, mean, var, epsilon)


def loaded(
    make: Callable[[Tensors], dict[str, np.ndarray]], tensors: Tensors, name: str, source: str
) -> Weights:
    """The weights that `make` takes out of a file's tensors.

    Raises:
      UserError: the file lacks one, or one has another shape.
    """
    try:
        return {key: jnp.asarray(value, jnp.float32) for key, value in make(tensors).items()}
    except KeyError as error:
        some = ", ".join(list(tensors)[:3])
        raise UserError(
            f"{source} has no {error.args[0]!r}, so it isn't {name}: it holds {some}, …; name the right file."
        ) from error
    except ValueError as error:
        raise UserError(f"{source} isn't {name}: {error}; name the right file.") from error
