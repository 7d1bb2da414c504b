"""Tensors of autoencoders' files: their shapes, and their order of axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from sora_jax.errors import UserError

SHOWN = 3  # of the tensors that differ


def channels_last(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of `stored_shape` as the parameter of `shape`: (out, in, T, Y, X) to (T, Y, X, in, out)."""
    if tensor.ndim > 1:
        tensor = np.ascontiguousarray(np.moveaxis(tensor, (0, 1), (-1, -2)))
    return tensor.reshape(shape)


def as_stored(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `channels_last`: the tensor, of that shape, of a parameter."""
    if len(shape) < 2:
        return np.asarray(array).reshape(shape)
    first, second, *sides = shape
    return np.ascontiguousarray(
        np.moveaxis(np.asarray(array).reshape(*sides, second, first), (-1, -2), (0, 1))
    )


def check_shapes(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where the shapes by name that are given aren't those that are wanted."""
    wrong = [
        ("missing", [name for name in wanted if name not in given]),
        ("unknown", [name for name in given if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} ({_sides(given[name])}, not {_sides(shape)})"
                for name, shape in wanted.items()
                if name in given and given[name] != shape
            ],
        ),
    ]
    if said := [f"{len(names)} {kind}: {_some(names)}" for kind, names in wrong if names]:
        raise UserError(
            f"The autoencoder's tensors are not those of its config.json; {'; '.join(said)}. Take both from one model."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"
