"""Low-rank updates of a model that stays as it is (LoRA, Hu et al. 2021, arXiv:2106.09685).

y = x W + b + alpha / rank · (x down) up. The updates are a tree of their own, a table from the path of a linear layer
("blocks/qkv") to its two matrices. So what is trained, averaged and saved are they alone, and the model is an argument
beside them. Layers that are stacked have stacked updates.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.config import FROM_ZERO, check_ranges
from sora_jax.errors import UserError
from sora_jax.models.layers import linear_layers

LoRA: TypeAlias = dict[str, dict[str, Any]]
Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get a low-rank update.

    Attributes:
      rank: of the updates; 0: there are none, and the whole model is trained.
      alpha: updates are multiplied by alpha / rank.
      targets: regular expression, searched in the path of each linear layer, such as `blocks/cross/kv`. Queries, keys
        and values that are one matrix here have updates of their own each.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: str = "^blocks/"

    def __post_init__(self) -> None:
        check_ranges(self, "lora", rank=FROM_ZERO, alpha=(0, math.inf))
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(
                f"config.lora.targets={self.targets!r} is no regular expression ({error}): write part of a layer's "
                "path, such as '^blocks/(qkv|out)$'."
            ) from None

    @property
    def factor(self) -> float:
        """Of the updates."""
        return self.alpha / self.rank


def init_lora(model: nnx.Module, config: LoRAConfig, key: jax.Array) -> LoRA:
    """Fresh updates, float32, which change nothing yet: `down` is drawn as PEFT draws it, `up` is 0.

    Args:
      model: read for shapes alone; `jax.eval_shape`'s will do.

    Raises:
      UserError: the targets are in no layer's path, or the rank is more than a layer's widths.
    """
    layers = linear_layers(model)
    chosen = {path: layer for path, layer in layers.items() if re.search(config.targets, path)}
    if not chosen:
        raise UserError(
            f"config.lora.targets={config.targets!r} is found in no layer's path: those are {', '.join(layers)}."
        )
    # One draw for all: each would be compiled by itself.
    inputs = [math.prod(layer.kernel.shape[:-1]) for layer in chosen.values()]
    sizes = [n * layer.parts * config.rank for n, layer in zip(inputs, chosen.values(), strict=True)]
    drawn = jnp.split(jax.random.uniform(key, (sum(sizes),), minval=-1.0), np.cumsum(sizes)[:-1])
    updates: LoRA = {}
    for (path, layer), own in zip(chosen.items(), drawn, strict=True):
        *stack, width_in, width = layer.kernel.shape
        width_out = width // layer.parts
        if config.rank > min(width_in, width_out):
            raise UserError(
                f"config.lora.rank={config.rank} is more than the {width_in}×{width_out} matrix {path!r} has: set "
                f"{min(width_in, width_out)} or less, or other config.lora.targets."
            )
        updates[path] = {
            "lora_down": own.reshape(*stack, width_in, layer.parts * config.rank) / math.sqrt(width_in),
            "lora_up": jnp.zeros((*stack, layer.parts * config.rank, width_out)),
        }
    return updates


def with_lora(model: Model, lora: LoRA, config: LoRAConfig) -> Model:
    """The model with the updates in its layers, all of its own parameters as they are (no copy is made of them)."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    layers = linear_layers(copy)
    for path, update in lora.items():
        layers[path].lora_down = nnx.Param(update["lora_down"])
        layers[path].lora_up = nnx.Param(update["lora_up"])
        layers[path].lora_factor = config.factor
    return copy


def merge_lora(model: Model, lora: LoRA, config: LoRAConfig) -> Model:
    """The model with the updates added to its matrices."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    layers = linear_layers(copy)
    for path, update in lora.items():
        kernel, parts = layers[path].kernel, layers[path].parts
        down, up = jnp.asarray(update["lora_down"]), jnp.asarray(update["lora_up"])
        *stack, width_in, _ = down.shape
        down = down.reshape(*stack, width_in, parts, config.rank)
        up = up.reshape(*stack, parts, config.rank, up.shape[-1])
        change = config.factor * jnp.einsum("...ipr,...pro->...ipo", down, up, precision="highest")
        value = kernel[...]
        kernel.set_value((value + change.reshape(value.shape)).astype(value.dtype))
    return copy
