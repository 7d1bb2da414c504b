"""TAEHV's decoder from its file, such as `taew2_1.safetensors` or `taew2_1.pth` for Wan 2.1."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.checkpoints.components import Bundle
from sora_jax.checkpoints.store import named_leaves, restore_into
from sora_jax.errors import UserError
from sora_jax.models.conv import Stride
from sora_jax.models.pickled import read_tensors
from sora_jax.models.taehv import BLOCKS, TAEHV, TAEHVConfig

_STAGE = BLOCKS + 3  # places of a stage in the original's list of layers, those without parameters counted


def load_taehv(
    path: str | os.PathLike[str], channels: int, compression: Stride, dtype: str = "float32"
) -> TAEHV:
    """The decoder of a file, for latents of so many channels and pixels.

    A file doesn't tell how many frames it makes of a latent frame: the last stages double them until they are those of
    `compression`. A stage that was trained to make two and is to make one makes the later one, as the original has it.

    Args:
      path: its file; the encoder's tensors are left out.
      channels, compression: of the latents to decode (frames, height, width of a cell).
      dtype: of the arithmetic.

    Raises:
      UserError: it can't be read, is of another architecture, or is for other latents.
    """
    tensors = read_tensors(pathlib.Path(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def side(name: str, axis: int = 0) -> int:
        if len(shapes.get(name, ())) != 4:
            raise UserError(
                f"{path} has no convolution {name}: it isn't TAEHV's, or of another architecture (_super)."
            )
        return shapes[name][axis]

    width, *widths = (side(f"decoder.{3 + _STAGE * stage}.conv.2.weight") for stage in range(3))
    last = f"decoder.{4 + _STAGE * 3}.weight"
    doublings = round(math.log2(compression[0]))
    config = TAEHVConfig(
        channels=side("decoder.1.weight", 1),
        widths=(width, widths[0], widths[1], side(last, 1)),
        strides=(2 if doublings > 2 else 1, 2 if doublings > 1 else 1, 2 if doublings else 1),
        patch=math.isqrt(side(last) // 3),
        dtype=dtype,
    )
    if (config.channels, config.compression) != (channels, tuple(compression)):
        raise UserError(
            f"{path} decodes latents of {_said(config.channels, config.compression)}, the model's have "
            f"{_said(channels, compression)}: take the decoder of this model."
        )
    template = jax.eval_shape(lambda: TAEHV(config, rngs=nnx.Rngs(0)))
    leaves = {}
    for name, leaf in named_leaves(template).items():
        stored = stored_name(name)
        tensor = np.asarray(tensors[stored], np.float32) if stored in tensors else np.zeros(0)
        if tensor.ndim == 4:
            tensor = tensor[-leaf.shape[-1] :].transpose(2, 3, 1, 0)
        if tensor.shape != leaf.shape:
            raise UserError(
                f"{path}: {stored} {_shape(shapes.get(stored))}: it is damaged, or of another architecture."
            )
        leaves[name] = jnp.asarray(tensor)
    return restore_into(template, leaves)


def with_decoder(bundle: Bundle, path: str | os.PathLike[str]) -> Bundle:
    """The model with a file's decoder in place of its autoencoder's, in the autoencoder's arithmetic.

    Raises:
      UserError: as `load_taehv`.
    """
    config = bundle.vae.config
    decoder = load_taehv(path, config.channels, config.compression, config.dtype)
    return dataclasses.replace(bundle, decoder=decoder)


def stored_name(name: str) -> str:
    """Of a parameter of `TAEHV`, such as "conv_in/kernel", the original's name of its tensor."""
    name = re.sub("kernel$", "weight", name.replace("/", "."))

    def place(match: re.Match[str]) -> str:
        stage, layer = 3 + _STAGE * int(match[1]), match[2]
        block = re.fullmatch(r"blocks\.(\d)\.convs\.(\d)", layer)
        if block:
            return f"decoder.{stage + int(block[1])}.conv.{2 * int(block[2])}"
        return f"decoder.{stage + BLOCKS + 1}.conv" if layer == "grow" else f"decoder.{stage + BLOCKS + 2}"

    name = re.sub(r"^stages\.(\d)\.(.+)(?=\.)", place, name)
    return name.replace("conv_in.", "decoder.1.").replace("conv_out.", f"decoder.{4 + 3 * _STAGE}.")


def _said(channels: int, compression: Stride) -> str:
    time, height, width = compression
    return f"{channels} channels and {time}x{height}x{width} pixels"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {'x'.join(map(str, shape))}"
