"""Where else a run's metrics and sheets go: TensorBoard, Weights & Biases."""

from __future__ import annotations

import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import PIL.Image

from sora_jax.errors import UserError, atomic_path


class Board(Protocol):
    """One of them."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the figures of a step."""

    def write_image(self, step: int, name: str, image: PIL.Image.Image) -> None:
        """Adds a picture."""

    def close(self) -> None:
        """Writes what is not yet written."""


class TensorBoard:
    """`workdir/tensorboard`, written by tensorboardX, which needs no TensorFlow."""

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise _missing("log.tensorboard", "tensorboardX", "tensorboard", "False") from error
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: PIL.Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of a Weights & Biases project; `workdir/wandb_run.txt` keeps its name there, so that it goes on."""

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("log.wandb", "wandb", "wandb", "''") from error
        self._wandb, kept = wandb, workdir / "wandb_run.txt"
        if not kept.exists():
            with atomic_path(kept) as temporary:
                temporary.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                id=kept.read_text().strip(),
                name=workdir.absolute().name,
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except Exception as error:  # no account, no network: its client raises errors of many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"config.log.wandb={project}: Weights & Biases can't be reached ({reason}): run wandb login, set "
                "WANDB_MODE=offline to keep the run in the workdir, or set config.log.wandb=''."
            ) from error

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def write_image(self, step: int, name: str, image: PIL.Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_boards(
    workdir: pathlib.Path, step: int, tensorboard: bool, wandb: str, config: Mapping[str, Any]
) -> list[Board]:
    """Those that are asked for; a run goes on from `step`, and what they have past it is dropped or not taken again.

    Raises:
      UserError: a package is missing, or Weights & Biases can't be reached.
    """
    boards: list[Board] = [TensorBoard(workdir, step)] if tensorboard else []
    return [*boards, WandB(workdir, wandb, config)] if wandb else boards


def _missing(key: str, package: str, extra: str, off: str) -> UserError:
    return UserError(
        f"config.{key} needs the package {package}: run pip install 'sora_jax[{extra}]', or set config.{key}={off}."
    )
