"""LTX-Video's autoencoder from the tensors of its file: a diffusers folder's, or the original code's single file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.checkpoints.vae_tensors import channels_last, check_shapes
from sora_jax.errors import UserError
from sora_jax.models.ltx_vae import LTXVAE
from sora_jax.models.ltx_vae_config import LTXVAEConfig

_STATISTICS = ("latents_mean", "latents_std")
_ORIGINAL_STATISTICS = "per_channel_statistics."  # several of them; two are used

# Pieces of the original's names, and diffusers' in their place.
_ORIGINAL = (
    (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
    (r"^per_channel_statistics\.std-of-means$", "latents_std"),
    (r"\.res_blocks\.", ".resnets."),
    (r"\.conv_shortcut\.(?!conv\.)", ".conv_shortcut.conv."),
    (r"\.norm3\.norm\.", ".norm3."),
    (r"\.last_time_embedder\.", ".time_embedder."),
    (r"\.last_scale_shift_table$", ".scale_shift_table"),
)


def load_ltx_vae(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> LTXVAE:
    """The autoencoder of a `vae/config.json` with the weights of its file, which has the latents' statistics too.

    Args:
      settings: the contents of the config.json; {} for an original file of 0.9.0.
      tensors: by diffusers' names or the original's, of any floating type. Each is read once, when its turn comes, so
        they may be views of a file: memory holds one tensor more than the model.
      dtype: of the arithmetic; parameters become float32.

    Raises:
      UserError: the configuration can't be used; or tensors are missing, unknown, or of another shape than it says.
    """
    config = LTXVAEConfig.read(settings, dtype)
    given = diffusers_names(tensors, config)
    check_shapes(stored_shapes(config), {name: tuple(tensors[own].shape) for name, own in given.items()})
    read = lambda name: np.asarray(tensors[given[name]], np.float32)
    mean, std = (tuple(map(float, read(name))) for name in _STATISTICS)
    config = dataclasses.replace(config, latents_mean=mean, latents_std=std)
    template = jax.eval_shape(lambda: LTXVAE(config, rngs=nnx.Rngs(0)))
    with jax.ensure_compile_time_eval():
        placed = {
            name: jnp.asarray(_ours(read(stored_name(name)), name, leaf.shape))
            for name, leaf in named_leaves(template).items()
        }
    return restore_into(template, placed)


def stored_shapes(config: LTXVAEConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by diffusers' names."""
    leaves = named_leaves(jax.eval_shape(lambda: LTXVAE(config, rngs=nnx.Rngs(0))))
    shapes = {stored_name(name): stored_shape(name, leaf.shape) for name, leaf in leaves.items()}
    return shapes | dict.fromkeys(_STATISTICS, (config.channels,))


def stored_name(name: str) -> str:
    """Of a parameter of `LTXVAE`, such as "encoder/conv_in/conv/kernel", diffusers' name of its tensor."""
    return re.sub("kernel$", "weight", name.replace("/", "."))


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of such a parameter's tensor, PyTorch's: channels (out, in), then the kernel's sides."""
    if re.search(r"per_channel_scale\d$", name):
        return (*shape, 1, 1)
    if not name.endswith("kernel"):
        return shape
    *kernel, width_in, width_out = shape
    return (width_out, width_in, *kernel)


def _ours(tensor: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return channels_last(tensor, shape) if name.endswith("kernel") else tensor.reshape(shape)


def diffusers_names(tensors: Mapping[str, Any], config: LTXVAEConfig) -> dict[str, str]:
    """Of each tensor that is used, diffusers' name and its own.

    An original file holds the transformer too, and more statistics than are used: these are left out.

    Raises:
      UserError: two tensors are of the same parameter.
    """
    original = any(name.startswith((_ORIGINAL_STATISTICS, "vae.")) for name in tensors)
    out: dict[str, str] = {}
    for given in tensors:
        name = given.removeprefix("vae.")
        if original and not name.startswith(("encoder.", "decoder.", _ORIGINAL_STATISTICS)):
            continue
        if original:
            name = _renamed(name, config)
        if name.startswith(_ORIGINAL_STATISTICS):
            continue
        if name in out:
            raise UserError(f"The autoencoder's file holds {name!r} twice, once as {given!r}.")
        out[name] = given
    return out


def _renamed(name: str, config: LTXVAEConfig) -> str:
    """By the original's name: it counts residual blocks, downsampling and upsampling of all stages in one list."""
    downs, ups = [], ["mid_block"]
    for i, down in enumerate(config.downs):
        stage = f"down_blocks.{i}"
        downs += [stage, *[f"{stage}.downsamplers.0"] * (down.stride is not None)]
        downs += [f"{stage}.conv_out"] * down.widened
    for i, up in enumerate(config.ups):
        stage = f"up_blocks.{i}"
        ups += [f"{stage}.conv_in"] * (up.width_in != up.width_out)
        ups += [*[f"{stage}.upsamplers.0"] * up.upsampled, stage]
    places = {"down": [*downs, "mid_block"], "up": ups}
    if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.", name):
        stages, index = places[match[2]], int(match[3])
        if index < len(stages):
            name = f"{match[1]}.{stages[index]}.{name[match.end() :]}"
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name
