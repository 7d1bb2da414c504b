"""An open model's sampler as the planner sees it, from the settings in its folder: no weights are read."""

from __future__ import annotations

import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ml_collections import ConfigDict

from sora_jax.checkpoints.components import DTYPES, Bundle, check_choice
from sora_jax.checkpoints.pretrained import STORED, pretrained_folder, read_shapes
from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.models.decode_windows import Windows, split_windows
from sora_jax.models.int8 import INT8
from sora_jax.models.layers import linear_layers
from sora_jax.tokens.packing import PackedBatch

OBJECTIVE = "published"
# Latent cells along the sides of the frame whose decoding is counted: its cost grows with their product.
_SIDE = 64


class PublishedSampler:
    """What `programs` asks of an objective, for a model that is sampled only.

    Args:
      config: of `published_config`.
    """

    def __init__(self, config: ConfigDict) -> None:
        own = config.transformer
        self.bundle = _shapes(pathlib.Path(config.pretrained), own.dtype)
        self.weights, self.pipeline = jnp.dtype(own.weights), config.pipeline

    @property
    def dit(self) -> Any:
        """The transformer's configuration."""
        assert self.bundle.dit is not None
        return self.bundle.dit.config

    @property
    def vae(self) -> Any:
        """The autoencoder's configuration."""
        return self.bundle.vae.config

    def init(self, key: jax.Array) -> Any:
        """The transformer in the type that its weights have in memory."""
        return stored_zeros(self.bundle.dit, self.weights)

    def shapes(self, batch_size: int) -> PackedBatch:
        """Of a batch of so many packed sequences, one segment each."""
        sizes, dit = self.pipeline, self.dit
        return PackedBatch.shapes(
            batch_size,
            sizes.seq_len,
            sizes.text_len,
            1,
            dit.patch_width,
            dit.text_width,
            reference=False,
            extra_width=dit.extra_width,
            picture=(sizes.picture_len, dit.picture_width),
        )

    def decoding_flops(self, frames: int, height: int, width: int) -> float:
        """Operations of decoding a clip of so many pixels."""
        time, high, wide = self.vae.compression
        kind: Any = type(self.bundle.vae)
        first, two = (_decoding_flops(kind, self.vae, count) for count in (1, 2))
        own = lambda count: first + (two - first) * (count - 1)
        latents, windows = 1 + (frames - 1) // time, getattr(self.bundle.vae, "windows", None)
        whole = sum(map(own, _window_sizes(latents, windows))) if windows else own(latents)
        return whole * (height // high) * (width // wide) / _SIDE**2

    def decoding_bytes(self, frames: int, height: int, width: int) -> float:
        """Of the finest activation of a decoder, for as much of a clip of so many pixels as it decodes at once."""
        autoencoder = self.bundle.vae
        time, high, wide = self.vae.compression
        cells = math.prod(autoencoder.tiles.shape(-(-height // high), -(-width // wide)))
        windows = getattr(autoencoder, "windows", None)
        latents = _window_sizes(1 + (frames - 1) // time, windows)[0] if windows else 1
        finest = latents * time * cells * high * wide / (self.vae.patch_size or 1) ** 2
        return 4.0 * finest * self.vae.decoder_widths[-1]


def stored_zeros(shapes: Any, weights: Any) -> Any:
    """A transformer of those shapes with zeros for weights, of the type that they have in memory; int8 is of matrices.

    To be traced, as all of it are arrays.
    """
    is_int8 = weights == INT8
    model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32 if is_int8 else weights), shapes)
    for path, layer in linear_layers(model).items() if is_int8 else ():
        if "blocks/" in path:  # as `models.int8.to_int8`
            shape = layer.kernel.shape
            layer.kernel = nnx.Param(jnp.zeros(shape, INT8))
            layer.kernel_scale = nnx.Param(jnp.zeros((*shape[:-2], shape[-1])))
    return model


def published_config(
    model: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    dtype: str = "bfloat16",
    weights: str = "",
) -> ConfigDict:
    """The sampling of one video by a diffusers folder, as a configuration for `programs`.

    Args:
      size: (height, width) in pixels; None, and `frames`: the model's own.
      dtype: of the arithmetic.
      weights: type of the transformer's parameters in memory, of `pretrained.STORED`; "" is `dtype`.

    Raises:
      UserError: there is no such folder, or its settings are of an architecture that isn't supported.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("weights", weights or dtype, STORED)
    folder = pretrained_folder(model, weights=False)
    bundle = _shapes(folder, dtype)
    sampling, limits, vae = bundle.sampling, bundle.limits, bundle.vae.config
    assert bundle.dit is not None
    patch = bundle.dit.config.patch
    height, width = size or frame_size(sampling.resolution, sampling.aspect)
    count = frames or round(sampling.duration * sampling.fps)
    if min(height, width) < 1 or count < 1:
        raise UserError(f"A video of {count} frames of {width}x{height} can't be: give at least 1 of each.")
    latent_frames = 1 + math.ceil((count - 1) / vae.compression[0])
    cells = [
        math.ceil(side / (pixels * by))
        for side, pixels, by in zip((height, width), vae.compression[1:], patch[1:])
    ]
    tokens = latent_frames * math.prod(cells)
    multiple = limits.seq_multiple or 1
    held = min(limits.tokens // math.prod(cells), limits.latent_frames or latent_frames)
    if held < min(latent_frames, 2):
        raise UserError(
            f"Frames of {width}x{height} are {math.prod(cells):,} tokens and a sequence of {bundle.name} holds "
            f"{limits.tokens:,}: choose a smaller --size."
        )
    if latent_frames > held:
        most = 1 + vae.compression[0] * (held - 1)
        windows = 1 + math.ceil((latent_frames - held) / (held - held // 2))
        raise UserError(
            f"A video of {count} frames of {width}x{height} is made in {windows} windows of up to {most} frames: plan "
            f"one of them, --frames {most}; it takes no more memory, and the video {windows} times as long."
        )
    return ConfigDict(
        {
            "objective": OBJECTIVE,
            "pretrained": str(folder),
            "transformer": {"dtype": dtype, "weights": weights or dtype},
            "pipeline": {
                "seq_len": -(-tokens // multiple) * multiple,
                "text_len": limits.text_len,
                "picture_len": limits.pictures,
                "batch_size": 1,
                "max_segments": 1,
            },
            "text": {"max_tokens": limits.text},
            "mesh": {},
            "video": {
                "resolution": min(height, width),
                "aspect": f"{width}:{height}",
                "seconds": count / sampling.fps,
                "fps": sampling.fps,
                "steps": sampling.steps,
                "passes": 1 + (sampling.guidance != 1),
            },
        }
    )


@functools.cache
def _shapes(folder: pathlib.Path, dtype: str) -> Bundle:
    """A plan asks for them several times."""
    return read_shapes(folder, dtype=dtype)


def _window_sizes(latent_frames: int, windows: Windows) -> list[int]:
    """Latent frames of each of the windows in which so many are decoded."""
    return [len(window) for window, *_ in split_windows(np.empty((latent_frames, 0)), windows)]


@functools.cache
def _decoding_flops(kind: Any, config: Any, latent_frames: int) -> float:
    """Of a decode of so many latent frames, of convolutions and matrix products in the form that accelerators run."""
    vae = jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    latent = jax.ShapeDtypeStruct((1, latent_frames, _SIDE, _SIDE, config.channels), jnp.float32)
    device = AbstractDevice("any", 1, "gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return _flops(jax.make_jaxpr(lambda model, x: model.decode(x))(vae, latent).jaxpr)


def _flops(jaxpr: Any) -> float:
    """Of the convolutions and products in a traced program without loops."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
            outputs = kernel[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        for value in parameters.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _flops(inner)
    return total
