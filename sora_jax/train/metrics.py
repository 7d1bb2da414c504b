"""A run's log: metrics.jsonl and boards, throughput and utilisation, what is printed at its start and end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from tqdm import tqdm

from sora_jax.config import COUNT, FROM_ZERO, check_ranges
from sora_jax.distributed.chips import chip_of
from sora_jax.distributed.hosts import all_gather_json
from sora_jax.errors import UserError, as_user_error, atomic_path
from sora_jax.train.boards import Board, open_boards


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs.

    Attributes:
      every: steps between metrics.
      heldout_every: steps between measurements of the loss on clips that training doesn't see (the data's validation
        split), with the same noise each time, of the averaged parameters where there are such; 0: none.
      heldout_batches: batches of each measurement.
      sheet_every: steps between sheets of samples; 0: none.
      profile_steps: the first step and the number of steps of which a JAX profile is written to workdir/profile, such
        as (10, 3); empty: none.
      tensorboard: whether metrics and sheets go to workdir/tensorboard too: pip install "sora_jax[tensorboard]".
      wandb: a project of Weights & Biases to which metrics and sheets go too, empty: none; needs sora_jax[wandb].
        WANDB_MODE=offline keeps them in workdir/wandb until `wandb sync`.
    """

    every: int = 50
    heldout_every: int = 500
    heldout_batches: int = 4
    sheet_every: int = 0
    profile_steps: tuple[int, ...] = ()
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("every", "heldout_batches"), COUNT)
        check_ranges(self, "log", heldout_every=FROM_ZERO, sheet_every=FROM_ZERO, **counts)
        if self.profile_steps and (len(self.profile_steps) != 2 or min(self.profile_steps) < 1):
            raise UserError(
                f"config.log.profile_steps={self.profile_steps} must be the first step and a number of steps, such as "
                "(10, 3), or () for no profile."
            )


class MetricsWriter:
    """Appends a line of JSON at a time to `workdir/metrics.jsonl`, and passes it to boards.

    A resumed run first drops the lines past the step it resumed from (and a last line cut short by a
    kill), so no step is there twice.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int, boards: Sequence[Board] = ()):
        """Args: `step` is the step that the run starts from; 0 starts an empty file."""
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        self._boards = boards

    def write(self, step: int, row: dict[str, float]) -> None:
        """Appends a line; values that are not finite become null, which JSON can't express."""
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps({"step": step} | clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise as_user_error(error, self.path) from error
        for board in self._boards:
            board.write(step, row)

    def write_image(self, step: int, name: str, image: PIL.Image.Image) -> None:
        """Shows a PIL image on the boards."""
        for board in self._boards:
            board.write_image(step, name, image)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; empty where there is none."""
    return [json.loads(line) for line in _lines(pathlib.Path(workdir) / "metrics.jsonl")]


class DataSummary(Protocol):
    """What a run's data are, in words (`str`) and numbers: how many files were skipped."""

    def metrics(self) -> Mapping[str, float]:
        """What is added to each line of metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What this host did in a step: tokens, positions with padding, model FLOPs, seconds it waited for its data."""

    tokens: int
    positions: int
    flops: float
    waited: float


class RunLog:
    """Reports how a run goes: a bar (or, without a terminal, lines), metrics.jsonl, boards, sheets.

    It is opened before any long work, since a board may be missing; `begin` comes when the data are there.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: LogConfig,
        start: int,
        steps: int,
        parameters: int,
        copies: float = 1.0,
        settings: Mapping[str, Any] | None = None,
    ):
        """Args: `start` is the step that the run starts from, `steps` the one it goes to; `copies` see `mesh.Share`;
        `settings` is the run's configuration, for boards that keep it."""
        self._copies, self._parameters = copies, parameters
        self.workdir = pathlib.Path(workdir)
        self._every, self._start, self._steps = config.every, start, steps
        self._writer: MetricsWriter | None = None
        if jax.process_index() == 0:
            boards = open_boards(self.workdir, start, config.tensorboard, config.wandb, settings or {})
            self._writer = MetricsWriter(workdir, start, boards)
        self._metrics: list[dict[str, float]] = []
        self._stats: list[StepStats] = []
        self._heldout: float | None = None
        self._heldout_row: dict[str, float] = {}
        self._data: Callable[[], DataSummary | None] = lambda: None
        self._bar: tqdm | None = None

    def begin(self, data: Callable[[], DataSummary | None]) -> None:
        """Says what is trained, and from where; `data()` is asked for each line of metrics, and at the end."""
        self._data, self._peak, self._clock = data, peak_flops(), time.perf_counter()
        self._processor = time.process_time()
        self._bar = tqdm(
            total=self._steps,
            initial=self._start,
            unit="step",
            disable=None if self._writer else True,
            dynamic_ncols=True,
        )
        begin = f"continues from step {self._start}" if self._start else "from the beginning"
        self.say(
            f"{self._parameters:,} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}; "
            f"{begin} to step {self._steps} in {self.workdir}"
        )
        if self._start < self._steps:
            self.say("compiling the first step: seconds to minutes, in which Ctrl-C has to wait")

    def end(self, step: int) -> None:
        """Says where the run has come to: called when its checkpoint is on the disk."""
        place = self.workdir / "checkpoints" / str(step)
        if self._start >= self._steps:
            self.say(
                f"nothing to do: {place} is at step {step} already; a higher config.steps than {self._steps} goes on."
            )
        elif step < self._steps:
            self.say(f"stopped at step {step} of {self._steps}; the checkpoint is {place}")
        else:
            self.say(f"done: {step} step{'' if step == 1 else 's'}; the checkpoint is {place}")
        if (summary := self._data()) and any(summary.metrics().values()):
            self.say(f"data: {summary}")

    def step(self, step: int, metrics: dict[str, float], stats: StepStats) -> None:
        """Counts a finished step; each `every` steps, at the end and with a held-out loss writes the means since the
        last line."""
        self._metrics.append(metrics)
        if self._bar is not None:
            self._bar.update()
        if step == self._start + 1:
            # Its time is mostly compilation.
            self._clock = time.perf_counter()
        else:
            self._stats.append(stats)
        if step % self._every == 0 or step == self._steps or self._heldout_row:
            self._row(step)

    def heldout(self, loss: float, seconds: float, processor_seconds: float) -> None:
        """Notes the held-out loss of the step that `step` comes to next, and leaves its seconds out of the pace."""
        self._heldout, self._heldout_row = loss, {"heldout_loss": loss}
        self._clock += seconds
        self._processor += processor_seconds

    def _row(self, step: int) -> None:
        means = {name: float(np.mean([m[name] for m in self._metrics])) for name in self._metrics[-1]}
        pace = self._pace()
        if self._writer is not None:
            summary = self._data()
            data = dict(summary.metrics()) if summary else {}
            # User and system time of this host's process since the last line, compilation included.
            spent = {"processor_seconds": time.process_time() - self._processor}
            self._writer.write(step, means | self._heldout_row | pace | spent | data)
        shown = {"loss": f"{means['loss']:.4f}"}
        if self._heldout is not None:
            shown["heldout_loss"] = f"{self._heldout:.4f}"
        if pace:
            shown["tokens/s"] = f"{pace['tokens_per_second']:.0f}"
            shown["utilisation"] = f"{pace['utilisation']:.1%}"
            shown["padding"] = f"{pace['padding']:.1%}"
            shown["left"] = tqdm.format_interval((self._steps - step) / pace["steps_per_second"])
        if self._bar is not None:
            self._bar.set_postfix(shown)
        if self._bar is None or self._bar.disable:
            figures = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {step}/{self._steps} {figures}")
        self._metrics, self._stats, self._heldout_row = [], [], {}
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def _pace(self) -> dict[str, float]:
        if not self._stats:
            return {}
        seconds = time.perf_counter() - self._clock
        own = np.sum([dataclasses.astuple(stats) for stats in self._stats], axis=0).tolist()
        # Sequences that are on several hosts are counted by each; all wait for the one that waits longest.
        tokens, positions, flops, waited = np.array(all_gather_json(own)).T
        tokens, positions, flops = (
            float(counts.sum()) / self._copies for counts in (tokens, positions, flops)
        )
        return {
            "tokens_per_step": tokens / len(self._stats),
            "flops_per_step": flops / len(self._stats),
            "steps_per_second": len(self._stats) / seconds,
            "tokens_per_second": tokens / seconds,
            "utilisation": flops / seconds / self._peak,
            "padding": 1 - tokens / max(positions, 1),
            "data_wait": float(waited.max()) / seconds,
        }

    def sheet(self, step: int, image: PIL.Image.Image | None) -> None:
        """Saves a sheet of samples as workdir/sheets/step_0001000.png; None is passed over."""
        if image is None or self._writer is None:
            return
        with atomic_path(self.workdir / "sheets" / f"step_{step:07d}.png") as path:
            image.save(path)
        self._writer.write_image(step, "sheet", image)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def say(self, line: str) -> None:
        """A line on stderr, of the first host alone."""
        if self._writer is not None:
            tqdm.write(line, file=sys.stderr)


def peak_flops() -> float:
    """FLOP/s of all devices at best: the data sheet's where known, else this machine's fastest matmul.

    Measured in float32 on CPUs and bfloat16 elsewhere, in some tenths of a second.
    """
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if chip := chip_of(kind):
        return chip.flops * count
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    # Virtual CPU devices share the same cores, so one is measured for all.
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
    return [line.rstrip("\n") for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
