"""What the peers share: what is asked of them, what they answer, and how our parameters get into their modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass
class Way:
    """One way of doing the work: a model, and a function that does it once."""

    model: torch.nn.Module
    once: Callable[[], Any]
    same: bool = False
    """Whether it is our arithmetic on our weights."""
    compare: Callable[[], torch.Tensor] | None = None
    """The result that should be the one in the file of arrays."""


@dataclasses.dataclass
class Request:
    """What is asked of a peer, with what every peer needs of it."""

    part: str
    work: str
    dtype: str
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """An input, floats as `dtype`."""
        tensor = torch.from_numpy(self.arrays[name]).to(DEVICE)
        return tensor.to(self.kind) if tensor.is_floating_point() else tensor

    def ready(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model where and as it is to run."""
        return model.to(DEVICE, self.kind).train(self.work == "training step")


def step(model: torch.nn.Module, losses: Callable[[], Any]) -> Callable[[], None]:
    """A training step with AdamW; `losses` gives one loss after another, each run backward before the next."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def once() -> None:
        for loss in losses():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
    """As inference runs."""

    def once() -> Any:
        with torch.inference_mode():
            return function()

    return once


def load(model: torch.nn.Module, arrays: Mapping[str, np.ndarray], stacked: str = "") -> None:
    """Fills `model`, whose parts have our names: "weights/blocks/qkv/kernel" goes to blocks.0.qkv.weight, …

    What stands under `stacked` has its layers along a leading axis.
    """
    state = {}
    for name, array in arrays.items():
        root, _, path = name.partition("/")
        if root != "weights":
            continue
        first, _, rest = path.partition("/")
        if stacked and first == stacked:
            state |= {published(f"{first}/{i}/{rest}"): turned(path, layer) for i, layer in enumerate(array)}
        else:
            state[published(path)] = turned(path, array)
    model.load_state_dict(state)


def published(path: str) -> str:
    return path.replace("/kernel", "/weight").replace("/", ".")


def turned(path: str, array: np.ndarray) -> torch.Tensor:
    """Matrices are [in, out] here and [out, in] in torch; kernels [t, y, x, in, out] and [out, in, t, y, x]."""
    if path.endswith("kernel"):
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return torch.from_numpy(np.ascontiguousarray(array))
