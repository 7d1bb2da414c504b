"""Checkpoints of a training run: model, EMA, optimizer and data iterator, saved as one by Orbax.

On disk a tree is a flat table from parameter names ("blocks/attention/query/kernel") to arrays, so a
checkpoint can be read without the code that wrote it, and a mismatch can be told by name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sora_jax.errors import UserError, as_user_error

policies = ocp.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this many steps stay for ever; 0: none.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, such as "blocks/attention/query/kernel", in the tree's order."""

    def name(path: tuple) -> str:
        # An nnx.Param shows its array under one more attribute, which is no part of the parameter's name.
        return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(template: Any, leaves: dict[str, Any]) -> Any:
    """The tree of `template` with its leaves taken by name."""
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in named_leaves(template)])


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: str | os.PathLike[str], config: CheckpointConfig):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        policy = policies.LatestN(config.keep)
        if config.keep_every:
            policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(config.keep_every)])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise as_user_error(error, self.folder) from error

    @property
    def latest(self) -> int | None:
        """The newest saved step."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, trees: dict[str, Any], iterator: Any) -> None:
        """Starts to save `trees` (by name, of arrays) and the state of `iterator` as step `step`.

        Returns when the arrays are copied to the host, so that the caller may donate them; the disk is
        written behind. A save that failed says so at the next `save`, `wait` or `close`.

        Raises:
          UserError: the disk is full or read-only.
        """
        self.wait()
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        if shutil.disk_usage(self.folder).free < 1.05 * need:
            raise UserError(
                f"No space is left on the disk for checkpoint {self.folder / str(step)}, which needs {need / 2**20:.0f} "
                f"MB: free some and start again to continue from step {self.latest or 0}."
            )
        parts = {name: named_leaves(tree) for name, tree in trees.items()}
        with _sentences(self.folder / str(step)):
            self._checkpointer.save_checkpointables_async(step, parts | {"data": iterator}, force=True)

    def restore(self, templates: dict[str, Any], iterator: Any) -> dict[str, Any]:
        """The trees of the newest checkpoint, and `iterator` set to the batch that comes next.

        Args:
          templates: by name, trees of jax.ShapeDtypeStruct with the shardings wanted.

        Raises:
          UserError: the checkpoint is of another architecture, or it can't be read.
        """
        folder = self.folder / str(self.latest)
        trees = {name: _load(folder, name, template) for name, template in templates.items()}
        with _unreadable(folder):
            ocp.load_checkpointables(folder, {"data": iterator})
        return trees

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with _sentences(self.folder):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases the threads."""
        with _sentences(self.folder):
            self._checkpointer.close()


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of the run in `workdir`.

    Raises:
      UserError: there is no run there, or its config.json is no JSON.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no training run: it has no config.json.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): put the run's configuration back in its place."
        ) from error


def load_params(
    workdir: str | os.PathLike[str], template: Any = None, ema: bool = True, step: int | None = None
) -> Any:
    """The model of a training run, without its optimizer.

    Args:
      workdir: the run's folder.
      template: the model as `jax.eval_shape` gives it; without it, a table from names to numpy arrays returns.
      ema: take the averaged weights where the run has them.
      step: which checkpoint; default: the newest.

    Raises:
      UserError: no such checkpoint, one of another architecture, or one that can't be read.
    """
    parent = pathlib.Path(workdir).absolute() / "checkpoints"
    steps = _steps(parent)
    if not steps or (step is not None and step not in steps):
        found = f"only {', '.join(map(str, steps))}" if steps else "none yet"
        raise UserError(
            f"{workdir} has no checkpoint{'' if step is None else f' of step {step}'}: there is {found}."
        )
    folder = parent / str(steps[-1] if step is None else step)
    name = "ema" if ema and (folder / "ema").is_dir() else "params"
    if template is None:
        with _unreadable(folder):
            saved = ocp.metadata(folder, name).metadata
        return jax.tree.map(np.asarray, _load(folder, name, saved))
    return _load(folder, name, template)


def _load(folder: pathlib.Path, name: str, template: Any) -> Any:
    wanted = named_leaves(template)
    with _unreadable(folder):
        saved = ocp.metadata(folder, name).metadata
    for key in [*wanted, *saved]:
        here, there = (tuple(table[key].shape) if key in table else None for table in (wanted, saved))
        if here != there:
            raise UserError(
                f"Checkpoint {folder} is of another architecture: {name} {key!r} {_shape(there)} there and "
                f"{_shape(here)} here; use the configuration of its run (config.json), or another workdir."
            )
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        key: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding else local,
        )
        for key, leaf in wanted.items()
    }
    with _unreadable(folder):
        leaves = ocp.load_checkpointables(folder, {name: abstract})[name]
    return fill(template, leaves)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"


def _steps(parent: pathlib.Path) -> list[int]:
    # Orbax writes beside the place and renames, so a bare number is a whole checkpoint.
    return sorted(int(path.name) for path in parent.glob("*") if path.name.isdigit())


class _sentences:
    """Turns what goes wrong while a checkpoint is written into a sentence."""

    def __init__(self, place: pathlib.Path):
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        text = f"{error}"
        if isinstance(error, OSError) and error.errno is not None:
            raise as_user_error(error, self.place) from error
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            # TensorStore has its own errors, with the system's words in them.
            if error is not None and os.strerror(code) in text:
                raise as_user_error(OSError(code, os.strerror(code)), self.place) from error


class _unreadable:
    """Turns what goes wrong while a checkpoint is read into a sentence that says how to go on without it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        earlier = [step for step in _steps(self.folder.parent) if step < int(self.folder.name)]
        onward = (
            f"continue from step {earlier[-1]} ({self.folder.parent / str(earlier[-1])})"
            if earlier
            else "start anew"
        )
        reason = f"{error}".strip().splitlines()[0][:120] if f"{error}".strip() else kind.__name__
        raise UserError(
            f"Checkpoint {self.folder} can't be read, it is truncated or damaged ({reason}): delete that folder to {onward}."
        ) from error
