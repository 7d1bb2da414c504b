"""Wan's autoencoder from the tensors of its file: a diffusers folder's, or the original `Wan2.1_VAE`, `Wan2.2_VAE`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.checkpoints.vae_tensors import channels_last, check_shapes
from sora_jax.models.wan_vae import WanVAE
from sora_jax.models.wan_vae_config import WanVAEConfig

# Pieces of the original's names, and diffusers' in their place.
_ORIGINAL = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(\w+)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def load_wan_vae(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> WanVAE:
    """The autoencoder of a `vae/config.json` with the weights of its file.

    Args:
      settings: the contents of the config.json; {} for an original file of Wan 2.1.
      tensors: by diffusers' names or the original's, of any floating type. Each is read once, when its turn comes, so
        they may be views of a file: memory holds one tensor more than the model.
      dtype: of the arithmetic; parameters become float32.

    Raises:
      UserError: the configuration can't be used; or tensors are missing, unknown, or of another shape than it says.
    """
    config = WanVAEConfig.read(settings, dtype)
    template = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    wanted = {name: stored_name(name, config) for name in named_leaves(template)}
    given = {diffusers_name(name, config): name for name in tensors}
    check_shapes(stored_shapes(config), {name: tuple(tensors[own].shape) for name, own in given.items()})
    with jax.ensure_compile_time_eval():
        leaves = {
            name: jnp.asarray(channels_last(np.asarray(tensors[given[wanted[name]]], np.float32), leaf.shape))
            for name, leaf in named_leaves(template).items()
        }
    return restore_into(template, leaves)


def stored_shapes(config: WanVAEConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by diffusers' names."""
    leaves = named_leaves(jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    return {stored_name(name, config): stored_shape(name, leaf.shape) for name, leaf in leaves.items()}


def stored_name(name: str, config: WanVAEConfig) -> str:
    """Of a parameter of `WanVAE`, such as "encoder/conv_in/kernel", diffusers' name of its tensor."""
    name = re.sub("kernel$", "weight", name.replace("/", ".")).replace(".resample.", ".resample.1.")
    return name if config.is_residual else name.replace(".upsampler.", ".upsamplers.0.")


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of such a parameter's tensor, PyTorch's: channels (out, in), then the kernel's sides."""
    sides = (1, 1) if re.search("/(norm|to_qkv|proj)/", name) else (1, 1, 1)  # of layers of single frames
    if name.endswith("bias"):
        return shape
    if name.endswith("gamma"):
        return (*shape, *sides)
    if "/time_conv/" in name:
        return shape[1], shape[0] // 3, 3, 1, 1
    *kernel, width_in, width_out = shape
    return (width_out, width_in, *(kernel or sides))


def diffusers_name(name: str, config: WanVAEConfig) -> str:
    """Of a tensor by the original's name, or by diffusers' already."""
    name = re.sub(r"\.downsamples\.", ".down_blocks.", name, count=1)
    name = re.sub(r"\.upsamples\.", ".up_blocks.", name, count=1)
    blocks, ups = config.num_res_blocks, config.num_res_blocks + 1
    if name.startswith("decoder.up_blocks.") and not config.is_residual and ".resnets." not in name:
        # The original counts all layers of the decoder's stages in one list.
        def place(match: re.Match[str]) -> str:
            stage, layer = divmod(int(match[1]), ups + 1)
            return f"up_blocks.{stage}.{'upsamplers.0' if layer == ups else f'resnets.{layer}'}."

        if ".upsamplers." not in name:
            name = re.sub(r"up_blocks\.(\d+)\.", place, name)
    name = re.sub(rf"\.downsamples\.{blocks}\.", ".downsampler.", name)
    name = re.sub(rf"\.upsamples\.{ups}\.", ".upsampler.", name)
    name = re.sub(r"\.(down|up)samples\.", ".resnets.", name)
    for original, ours in _ORIGINAL:
        name = re.sub(original, ours, name)
    return name
