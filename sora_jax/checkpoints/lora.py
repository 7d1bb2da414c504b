"""LoRA files (Hu et al. 2021) on open models: read in the spellings that are around, and merged while weights are read.

Spellings: diffusers' and PEFT's ("transformer.blocks.0.attn1.to_q.lora_A.weight"), lightx2v's and ComfyUI's
("diffusion_model.blocks.0.self_attn.q.lora_down.weight", with whole differences as ".diff" and ".diff_b"), and Kohya's
("lora_unet_blocks_0_self_attn_q.lora_up.weight"). The update of a matrix is scale · alpha / rank · up · down; alpha is
a tensor of the file, or in PEFT's metadata, or else the rank.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors

from sora_jax.errors import UserError, user_path
from sora_jax.models.weights import read_weights, release

_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|diffusion_model\.|model\.diffusion_model\.)+")
_KOHYA = re.compile(r"^lora_(unet|transformer)_")
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".diff": "difference",
    ".diff_b": "bias difference",
}


class Update(NamedTuple):
    """What is added to one tensor: `factor` · up · down, or `factor` · difference."""

    factor: float
    up: np.ndarray | None
    down: np.ndarray | None
    difference: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it is added to."""
        if self.difference is not None:
            return self.difference.shape
        assert self.up is not None and self.down is not None
        return len(self.up), *self.down.shape[1:]

    def value(self) -> np.ndarray:
        """float32."""
        if self.difference is not None:
            return self.factor * self.difference.astype(np.float32)
        assert self.up is not None and self.down is not None
        up, down = (array.astype(np.float32).reshape(len(array), -1) for array in (self.up, self.down))
        return (self.factor * (up @ down)).reshape(self.shape)


class Merged(Mapping[str, np.ndarray]):
    """Tensors with updates added, each when it is read."""

    def __init__(self, tensors: Mapping[str, np.ndarray], updates: Mapping[str, Sequence[Update]]) -> None:
        self._tensors, self._updates = tensors, updates

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if name not in self._updates:
            return tensor
        merged = tensor.astype(np.float32)
        release(tensor)
        for update in self._updates[name]:
            merged += update.value().reshape(merged.shape)
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def merge_loras(
    tensors: Mapping[str, np.ndarray],
    loras: Sequence[tuple[str, float]],
    rename: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Mapping[str, np.ndarray]:
    """The tensors of a model with LoRA files merged into them.

    Args:
      tensors: by the model's names.
      loras: (file, scale) each; several add up.
      rename: names of the original code to the model's, as `wan_weights.diffusers_names`.

    Raises:
      UserError: a file can't be read, is of another model, or holds what isn't a LoRA.
    """
    updates: dict[str, list[Update]] = {}
    for name, scale in loras:
        path = user_path(name)
        for target, update in read_lora(path, tensors, rename, scale).items():
            wanted = tensors[target].shape
            if int(np.prod(update.shape)) != int(np.prod(wanted)) or update.shape[0] != wanted[0]:
                raise UserError(
                    f"{path} is for another model: its update of {target!r} is {update.shape} and that is {wanted}."
                )
            updates.setdefault(target, []).append(update)
    return Merged(tensors, updates)


def read_lora(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    rename: Callable[[Mapping[str, Any]], dict[str, Any]],
    scale: float = 1.0,
) -> dict[str, Update]:
    """The updates of a LoRA file by the name of the tensor that each is for.

    Raises:
      UserError: as `merge_loras`.
    """
    if path.is_dir():
        path = path / "pytorch_lora_weights.safetensors"
    parts: dict[str, dict[str, np.ndarray]] = {}
    joined = _joined_names(tensors, rename)
    for name, tensor in read_weights(path).items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            raise UserError(
                f"{path} holds {name!r}, which is no part of a LoRA that can be merged: pairs of lora_A and lora_B (or "
                "lora_down and lora_up), alpha, diff and diff_b can."
            )
        parts.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
    settings, updates = _read_settings(path), {}
    for module, own in parts.items():
        plain = joined.get(_KOHYA.sub("", module), "") if _KOHYA.match(module) else _PREFIX.sub("", module)
        (target,) = rename({f"{plain}.weight": None})
        if target not in tensors:  # a table, which has no ".weight"
            (target,) = rename({plain: None})
        if not plain or target not in tensors:
            raise UserError(
                f"{path} is for another model: it changes {module!r}, which this one doesn't have."
            )
        if ("up" in own) != ("down" in own):
            raise UserError(f"{path} has only half of the update of {module!r}: fetch it again.")
        if "up" in own:
            rank = len(own["down"])
            if own["up"].reshape(len(own["up"]), -1).shape[1] != rank:
                raise UserError(
                    f"{path}: the two matrices of {module!r} are of different ranks; fetch it again."
                )
            alpha = settings.get("alpha_pattern", {}).get(plain, settings.get("lora_alpha", rank))
            alpha = float(own["alpha"]) if "alpha" in own else float(alpha)
            divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
            updates[target] = Update(scale * alpha / divisor, own["up"], own["down"], None)
        if "difference" in own:
            updates[target] = Update(scale, None, None, own["difference"])
        if "bias difference" in own:
            updates[f"{target.removesuffix('.weight')}.bias"] = Update(
                scale, None, None, own["bias difference"]
            )
    if not updates:
        raise UserError(f"{path} holds no update: it is no LoRA.")
    return updates


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    """PEFT's settings from the file's metadata, without their component's name; none where there are none."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    return {_PREFIX.sub("", key): value for key, value in settings.items()}


_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
}


def _joined_names(
    tensors: Mapping[str, np.ndarray], rename: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, str]:
    """Kohya's spelling of each module, with underscores for dots, and its own."""
    modules = {name.rsplit(".", 1)[0] for name in tensors}
    out = {module.replace(".", "_"): module for module in modules}
    for block in {module.rsplit(".", 2)[0] for module in modules if module.startswith("blocks.")}:
        block = ".".join(block.split(".")[:2])
        for attention, old in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for ours, theirs in _ATTENTION.items():
                out[f"{block}.{old}.{theirs}".replace(".", "_")] = f"{block}.{attention}.{ours}"
        for ours, theirs in (("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2")):
            out[f"{block}.{theirs}".replace(".", "_")] = f"{block}.{ours}"
    return out
