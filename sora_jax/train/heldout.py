"""The loss on held-out batches: the same batches, noise and sigmas at each measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.data.sources import DataConfig, make_sheet_sources, read_mixture
from sora_jax.distributed.mesh import place_batch, sharding
from sora_jax.media.clip import ClipSource
from sora_jax.train.protocol import Objective

_FOLD = 2**32 - 1  # of the root key: no step is ever folded in that high


class HeldOut:
    """Measures an objective's loss on fixed batches, by one compiled program apart from the training step's.

    Args:
      batches: this host's part of each (`Objective.heldout_data`).
      root: the run's key; that of each batch is folded from it, so it is the same in every measurement and after a
        restart.
    """

    def __init__(self, objective: Objective, mesh: Mesh, batches: Sequence[Any], root: jax.Array) -> None:
        def loss(model: Any, batch: Any, root: jax.Array, index: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(root, _FOLD), index)
            return objective.loss(model, batch, key)[0]

        self._mesh, self._batches, self._root = mesh, batches, root
        self._loss = jax.jit(loss, out_shardings=sharding(mesh, ""))

    def measure(self, model: Any) -> tuple[float, float]:
        """The mean loss of `model` over the batches, the same number on every host, and the seconds that it took."""
        jax.block_until_ready(model)  # the step under way isn't part of those seconds
        before = time.perf_counter()
        losses = []
        for index, own in enumerate(self._batches):
            batch = place_batch(self._mesh, own)
            with jax.set_mesh(self._mesh):
                losses.append(self._loss(model, batch, self._root, np.int32(index)))
        return float(np.mean(jax.device_get(losses))), time.perf_counter() - before


def heldout_sources(
    config: DataConfig, clips: int, crop: tuple[int, int, int] | None = None
) -> list[tuple[ClipSource, float]]:
    """Of the data sets of `config` the parts that training doesn't see, with their weights; some have none.

    Args:
      clips: the length of each.
      crop: as `make_sources`.
    """
    if config.split != "train":
        return []
    sources, names = make_sheet_sources(config, clips, crop), read_mixture(config.source)
    return [
        (source, weight)
        for (source, held_out), (_, weight) in zip(sources, names, strict=True)
        if held_out and weight > 0
    ]
