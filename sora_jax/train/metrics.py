"""What a training run says of itself: metrics.jsonl, TensorBoard, throughput and utilisation."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError, as_user_error, atomic_path


class MetricsWriter:
    """Appends one JSON object a row to `workdir/metrics.jsonl`, and to TensorBoard where asked.

    A resumed run first drops the rows past the step it resumed from (and a last row cut short by a kill),
    so no step stands twice.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int, tensorboard: bool = False):
        """Args: `step` is the step that the run starts from; 0 starts the file anew."""
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = _board(self.path.parent / "tensorboard", step) if tensorboard else None

    def write(self, step: int, row: dict[str, float]) -> None:
        """Appends a row; values that are not finite become null, since JSON has no word for them."""
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps({"step": step} | clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise as_user_error(error, self.path) from error
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Shows a PIL image in TensorBoard, where that is on."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; empty where there is none."""
    return [json.loads(line) for line in _lines(pathlib.Path(workdir) / "metrics.jsonl")]


class Throughput:
    """Tokens a second, utilisation and padding since it was last read."""

    def __init__(self, peak: float):
        """Args: `peak` is the FLOP/s that the devices could do at best."""
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._steps = self._real = self._slots = 0
        self._flops = 0.0

    def add(self, real: int, slots: int, flops: float, waited: float) -> None:
        """Counts one step: its tokens, its slots, its model FLOPs, its seconds of waiting for data."""
        self._steps += 1
        self._real += real
        self._slots += slots
        self._flops += flops
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Figures since the last read, none where no step was counted; starts anew."""
        if not self._steps:
            self._reset()
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        figures = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._real / seconds,
            "utilisation": self._flops / seconds / self.peak,
            "padding": 1 - self._real / max(self._slots, 1),
            "data_wait": self._waited / seconds,
        }
        self._reset()
        return figures


# Dense bf16 peaks in FLOP/s from the vendors' data sheets, by the start of jax.Device.device_kind.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops() -> float:
    """FLOP/s of all devices at best: the data sheet's where known, else this machine's fastest matmul.

    Measured in float32 on CPUs and bfloat16 elsewhere, in some tenths of a second.
    """
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    for name, peak in PEAKS.items():
        if kind.startswith(name):
            return peak * count
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    # Virtual CPU devices share the same cores, so one of them stands for all.
    return _measure_matmul(size, dtype) * (1 if on_cpu else count)


def _measure_matmul(size: int, dtype: Any, budget: float = 0.3) -> float:
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < budget:
        before = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def parameter_count(tree: Any) -> int:
    """Numbers in a pytree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _lines(path: pathlib.Path) -> list[str]:
    # Only a kill in the middle of a write leaves a last line without its end.
    if not path.exists():
        return []
    return [line.rstrip("\n") for line in path.open() if line.endswith("\n")]


def _board(folder: pathlib.Path, step: int) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "config.log.tensorboard needs the package tensorboardX: install it, or set config.log.tensorboard=False."
        ) from error
    return tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
