"""LPIPS: how differently a network trained on pictures sees two of them, from local weights.

Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv:1801.03924, version 0.1: AlexNet's or VGG-16's activations, scaled to
unit length, their squared differences weighted by one matrix a layer and averaged.
"""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation.networks.layers import Tensors, Weights, conv, kernel_of, max_pool
from sora_jax.models.pickled import read_tensors

# Convolutions as (index among torchvision's layers, stride, padding); "pool"; "tap" after what is compared.
Plan = tuple[tuple[int, int, int] | str, ...]
ALEX: Plan = (
    *((0, 4, 2), "tap", "pool"),
    *((3, 1, 2), "tap", "pool"),
    *((6, 1, 1), "tap", (8, 1, 1), "tap", (10, 1, 1), "tap"),
)
VGG: Plan = (
    *((0, 1, 1), (2, 1, 1), "tap", "pool"),
    *((5, 1, 1), (7, 1, 1), "tap", "pool"),
    *((10, 1, 1), (12, 1, 1), (14, 1, 1), "tap", "pool"),
    *((17, 1, 1), (19, 1, 1), (21, 1, 1), "tap", "pool"),
    *((24, 1, 1), (26, 1, 1), (28, 1, 1), "tap"),
)
PLANS = {"alex": ALEX, "vgg": VGG}
LEAST_SIDE = {"alex": 31, "vgg": 16}  # below it the last activation is empty
_POOL = {"alex": 3, "vgg": 2}
_SHIFT, _SCALE = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])


def lpips(weights: Weights, frames: jax.Array, references: jax.Array, trunk: str) -> jax.Array:
    """The distance f[B] of frames f[B,Y,X,3] and references of the same shape, both in 0..255."""
    both = jnp.concatenate([frames, references]) / 127.5 - 1
    distance = jnp.zeros(len(frames))
    x, layer = (both - _SHIFT) / _SCALE, 0
    for step in PLANS[trunk]:
        if not isinstance(step, str):
            index, stride, padding = step
            x = jax.nn.relu(conv(weights, str(index), x, stride, padding))
        elif step == "pool":
            x = max_pool(x, (_POOL[trunk],) * 2, (2, 2))
        else:
            unit = x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)
            squared = (unit[: len(frames)] - unit[len(frames) :]) ** 2
            distance += jnp.mean(jnp.matmul(squared, weights[f"lin{layer}"], precision="highest"), (1, 2))
            layer += 1
    return distance


def read_lpips(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a whole state dict of LPIPS, or of a folder with the trunk's (torchvision's) and the layers'.

    Raises:
      UserError: they can't be read.
    """
    if not path.is_dir():
        return read_tensors(path)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if not files:
        raise UserError(
            f"{path} has no weights of LPIPS: put the trunk's file and the layers' there (.pth, .safetensors)."
        )
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def trunk_of(tensors: Tensors) -> str:
    """ "alex" or "vgg", by the first convolution."""
    first = _published(tensors).get("features.0.weight")
    return "alex" if first is not None and first.shape[-1] == 11 else "vgg"


def convert(tensors: Tensors) -> dict[str, np.ndarray]:
    """The trunk's kernels and biases, and one vector of weights a compared layer."""
    tensors = _published(tensors)
    plan = PLANS[trunk_of(tensors)]
    out = {}
    for index in (step[0] for step in plan if isinstance(step, tuple)):
        out[f"{index}.kernel"] = kernel_of(tensors[f"features.{index}.weight"])
        out[f"{index}.bias"] = tensors[f"features.{index}.bias"]
    for layer in range(plan.count("tap")):
        out[f"lin{layer}"] = tensors[f"lin{layer}.model.1.weight"].ravel()
    return out


def _published(tensors: Tensors) -> dict[str, np.ndarray]:
    """Under torchvision's names: LPIPS calls features.3.weight of its trunk net.slice2.3.weight."""
    return {
        re.sub(r"^(net\.)+slice\d+\.(\d+)\.", r"features.\2.", name): tensor
        for name, tensor in tensors.items()
    }
