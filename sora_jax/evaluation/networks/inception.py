"""Inception-v3 as Fréchet image distances use it, from local weights.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2015, arXiv:1512.00567. The standard weights are TensorFlow's of 2015-12-05,
which pytorch-fid publishes as `pt_inception-2015-12-05-6726825d.pth`; its network differs from torchvision's in that
means don't count padding, and in that the last block takes a maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.evaluation.networks.layers import Tensors, Weights, conv, folded, max_pool, mean_pool, resize

WIDTH, SIDE = 2048, 299
_EPSILON = 1e-3
_STEM = (
    (("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)),
    (("Conv2d_3b_1x1", 1, 0), ("Conv2d_4a_3x3", 1, 0)),
)
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# By the digit and letter of a block: its branches, each of convolutions with their stride; a tuple of names side by
# side; "pool" where a branch begins with a pool.
_KINDS = {
    "A": (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ),
    "C": (
        ("branch1x1",),
        ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
    ),
    "E": (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    ),
}
_KIND = {"5b": "A", "5c": "A", "5d": "A", "6b": "C", "6c": "C", "6d": "C", "6e": "C", "7b": "E", "7c": "E"}
_REDUCTIONS = {
    "6a": (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")),
    "7a": (
        ("branch3x3_1", "branch3x3_2"),
        ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
    ),
}


def prepare(frames: jax.Array) -> jax.Array:
    """Frames f[B,Y,X,3] in 0..255 as the network takes them: 299 x 299 as pytorch-fid resizes, in [-1,1]."""
    return resize(frames, SIDE, SIDE) / 127.5 - 1


def features(weights: Weights, x: jax.Array) -> jax.Array:
    """Pooled features f[B,2048] of prepared frames f[B,299,299,3]."""
    for group in _STEM:
        for name, stride, padding in group:
            x = jax.nn.relu(conv(weights, name, x, stride, padding))
        x = max_pool(x, (3, 3), (2, 2))
    for block in _MIXED:
        x = _reduced(weights, block, x) if block in _REDUCTIONS else _mixed(weights, block, x)
    return x.mean((1, 2))


def _mixed(weights: Weights, block: str, x: jax.Array) -> jax.Array:
    outputs = []
    for branch in _KINDS[_KIND[block]]:
        y = x
        for step in branch:
            names = step if isinstance(step, tuple) else (step,)
            y = jnp.concatenate([_unit(weights, f"Mixed_{block}.{name}", y) for name in names], -1)
        outputs.append(y)
    # A maximum in the last block is likely a slip of the port, but what all published distances have.
    pooled = max_pool(x, (3, 3), (1, 1), "SAME") if block == "7c" else mean_pool(x, (3, 3), "SAME")
    return jnp.concatenate([*outputs, _unit(weights, f"Mixed_{block}.branch_pool", pooled)], -1)


def _reduced(weights: Weights, block: str, x: jax.Array) -> jax.Array:
    outputs = []
    for branch in _REDUCTIONS[block]:
        y = x
        for name in branch[:-1]:
            y = _unit(weights, f"Mixed_{block}.{name}", y)
        outputs.append(jax.nn.relu(conv(weights, f"Mixed_{block}.{branch[-1]}", y, 2, 0)))
    return jnp.concatenate([*outputs, max_pool(x, (3, 3), (2, 2))], -1)


def _unit(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    return jax.nn.relu(conv(weights, name, x))  # odd kernels at stride 1: "SAME" pads alike on both sides


def convert(tensors: Tensors) -> dict[str, np.ndarray]:
    """The state dict's convolutions with their normalization folded in."""
    names = [name for group in _STEM for name, *_ in group]
    for block in _MIXED:
        branches = _REDUCTIONS.get(block) or (*_KINDS[_KIND[block]], ("branch_pool",))
        steps = (step if isinstance(step, tuple) else (step,) for branch in branches for step in branch)
        names += [f"Mixed_{block}.{name}" for step in steps for name in step]
    out = {}
    for name in names:
        out[f"{name}.kernel"], out[f"{name}.bias"] = folded(tensors, f"{name}.conv", f"{name}.bn", _EPSILON)
    return out
