"""Weight-only int8: the matrices of a transformer's blocks, a byte a number and a float32 scale for each column.

x W ≈ (x kernel) · scale with kernel = round(W / scale) and scale = max |W| / 127 of each column: symmetric and per
output channel, the weights' half of vector-wise quantization (Dettmers et al. 2022, arXiv:2208.07339, section 2).
Products are in the arithmetic's type, to which a layer's matrix is cast when it is used: in a scan over layers one at a
time. Biases, norms, modulation tables and what stands before and after the blocks stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models.layers import linear_layers

INT8 = np.dtype(np.int8)
Model = TypeVar("Model", bound=nnx.Module)


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float[..., in, out] as int8 of the same shape and float32[..., out], by which its columns are multiplied."""
    matrix = np.asarray(matrix, np.float32)
    scale = np.abs(matrix).max(-2) / np.float32(127)
    rounded = matrix / np.where(scale, scale, 1)[..., None, :]
    return np.rint(rounded, out=rounded).astype(np.int8), scale


def with_scales(model: Model, scales: Mapping[str, Any]) -> Model:
    """The model whose kernels are int8 already, with their scales, by the paths of its linear layers."""
    layers = linear_layers(model)
    for path, scale in scales.items():
        layers[path].kernel_scale = nnx.Param(scale)
    return model


def to_int8(model: Model) -> Model:
    """A whole model with the matrices of its `blocks` as int8; those of the one given stay as they are."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    scales = {}
    for path, layer in linear_layers(copy).items():
        if path.startswith("blocks/"):
            kernel, scales[path] = map(jnp.asarray, quantize(np.asarray(layer.kernel[...])))
            layer.kernel = nnx.Param(kernel)
    return with_scales(copy, scales)


def weight_bytes(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> int:
    """What a transformer's parameters take in memory.

    Args:
      shapes: published names and shapes, of the whole or of a part.
      dtype: of the parameters; of int8 those that aren't matrices of blocks are float32.
    """
    total = 0
    for name, shape in shapes:
        if dtype == INT8:
            is_matrix = "blocks." in name and name.endswith(".weight") and len(shape) > 1
            total += math.prod(shape) + 4 * shape[0] if is_matrix else 4 * math.prod(shape)
        else:
            total += dtype.itemsize * math.prod(shape)
    return total
