"""The loss on held-out batches: the same batches, noise and sigmas at each measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.distributed.mesh import place_batch, sharding
from sora_jax.train.protocol import Objective

_FOLD = 2**32 - 1  # of the root key: no step is ever folded in that high


class HeldOut:
    """Measures an objective's loss on fixed batches, by one compiled program apart from the training step's.

    Args:
      batches: this host's part of each (`Objective.heldout_data`).
      root: the run's key; that of each batch is folded from it, so it is the same in every measurement and after a
        restart.
      frozen: what the loss takes besides (`loop.place_frozen`).
    """

    def __init__(
        self,
        objective: Objective,
        mesh: Mesh,
        batches: Sequence[Any],
        root: jax.Array,
        frozen: Sequence[Any] = (),
    ) -> None:
        def loss(model: Any, batch: Any, root: jax.Array, index: jax.Array, *frozen: Any) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(root, _FOLD), index)
            return objective.loss(model, batch, key, *frozen)[0]

        self._mesh, self._batches, self._root, self._frozen = mesh, batches, root, frozen
        self._loss = jax.jit(loss, out_shardings=sharding(mesh, ""))

    def measure(self, model: Any) -> tuple[float, float, float]:
        """The mean loss of `model` over the batches, the same number on every host, and the seconds that it took.

        They are those of the clock and those of this process on all cores.
        """
        jax.block_until_ready(model)  # the step under way isn't part of those seconds
        before, processor_before = time.perf_counter(), time.process_time()
        losses = []
        for index, own in enumerate(self._batches):
            batch = place_batch(self._mesh, own)
            with jax.set_mesh(self._mesh):
                losses.append(self._loss(model, batch, self._root, np.int32(index), *self._frozen))
        loss = float(np.mean(jax.device_get(losses)))
        return loss, time.perf_counter() - before, time.process_time() - processor_before
