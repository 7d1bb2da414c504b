"""A tiny objective on which the loop is tested, and a command that trains it: linear regression."""

from __future__ import annotations

import itertools
import os
import sys
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from PIL import Image

from sora_jax.data.shards import Sharded, own_shards
from sora_jax.distributed.mesh import Share
from sora_jax.train.loop import train
from sora_jax.train.loop_config import LoopConfig
from sora_jax.train.metrics import DataSummary

ROWS, WIDTH = 4, 8


class Line(nnx.Module):
    """y = x @ w + b."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, 1, rngs=rngs)
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)[..., 0]


def stack(rows: list[dict]) -> dict:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class LineObjective:
    """Fits a line; `nan_at` poisons the data of that step (1 is the first)."""

    heldout_shards = 1
    schema: ClassVar[type[LoopConfig]] = LoopConfig

    def __init__(self, width: int = WIDTH, nan_at: int | None = None) -> None:
        self.width, self.nan_at = width, nan_at
        self.traces = 0

    def init(self, key: jax.Array) -> Line:
        return Line(self.width, nnx.Rngs(key))

    def loss(self, model: Line, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        self.traces += 1
        noise = 0.1 * jax.random.normal(key, batch["x"].shape)
        error = model(batch["x"] + noise) - batch["y"]
        return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}

    def data(self, config: ml_collections.ConfigDict, share: Share) -> grain.IterDataset:
        return self.batches(config.data.clips, config.seed, config.data.get("shards", 1), share)

    def heldout_data(self, share: Share, batches: int) -> list[dict]:
        return list(itertools.islice(self.batches(1000, 77, self.heldout_shards, share), batches))

    def batches(self, clips: int, seed: int, shards: int, share: Share) -> grain.IterDataset:
        width, nan_at = self.width, self.nan_at

        def make(index: int, rng: np.random.Generator) -> dict:
            x = rng.standard_normal(width).astype(np.float32)
            poisoned = nan_at is not None and index // ROWS == nan_at - 1
            return {"x": x, "y": np.float32(np.nan if poisoned else x.sum() + 1), "index": np.int32(index)}

        source = grain.MapDataset.range(clips).seed(seed).random_map(make).repeat()
        streams = {
            shard: source[shard::shards].to_iter_dataset() for shard in own_shards(share, shards, ROWS)
        }
        return Sharded(streams, ROWS // shards).map(stack)

    def flops(self, batch: dict) -> float:
        return 6.0 * batch["x"].size

    def tokens(self, batch: dict) -> tuple[int, int]:
        return ROWS * 3, ROWS * 4

    def sample_sheet(self, model: Line, step: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (step % 256, 0, 0))

    def data_summary(self) -> DataSummary | None:
        return None


def get_config(steps: int = 12) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "objective": "line",
            "seed": 3,
            "steps": steps,
            "data": {"clips": 1000},
            "optim": {"lr": 0.1, "warmup": 2, "ema_decay": 0.9},
            "log": {"every": 1, "sheet_every": 0, "tensorboard": False},
            "checkpoint": {"every": 3, "keep": 2},
            "mesh": {"data": 1},
            "stop_on_nan": True,
        }
    )


class FatalLineObjective(LineObjective):
    """Sends the process a signal when it looks at a given step."""

    def __init__(self, step: int, signal_number: int):
        super().__init__()
        self.step, self.signal_number = step, signal_number

    def tokens(self, batch: dict) -> tuple[int, int]:
        if int(batch["index"][0]) // ROWS + 1 == self.step:
            os.kill(os.getpid(), self.signal_number)
        return super().tokens(batch)


if __name__ == "__main__":
    workdir, steps, fatal_step, fatal_signal = sys.argv[1:]
    train(get_config(int(steps)), workdir, FatalLineObjective(int(fatal_step), int(fatal_signal)))
