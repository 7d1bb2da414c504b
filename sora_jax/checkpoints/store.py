"""Checkpoints of a training run: model, EMA, optimizer and data iterator, saved as one by Orbax.

They don't depend on the devices or hosts that saved them: arrays are restored on any mesh, and the data's state is one
table of all shards (`data.shards`), of which each host takes its own.

On disk a tree is a flat table from parameter names ("blocks/attention/query/kernel") to arrays, so a
checkpoint can be read without the code that wrote it, and a mismatch is reported by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from sora_jax.config import COUNT, FROM_ZERO, check_ranges, with_new_names
from sora_jax.distributed.hosts import all_gather_json, assert_equal_across_hosts, barrier
from sora_jax.distributed.mesh import to_device
from sora_jax.errors import UserError, as_user_error, atomic_path

policies = ocp.training.preservation_policies

# What may change when a run resumes; anything else would make it another run.
FREE_TO_CHANGE = (
    *("steps", "log", "checkpoint", "mesh", "stop_on_nan", "video"),
    *("optim.offload", "optim.ema_every", "dit.sequence", "dit.attention"),
    *("pretrained", "transformer.sequence", "transformer.attention"),  # that it is the same model is checked
    *("pipeline.threads", "pipeline.prefetch", "text.cache_size"),
)


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

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint", every=COUNT, keep=COUNT, keep_every=FROM_ZERO)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, such as "blocks/attention/query/kernel", in the tree's order."""

    def name(path: tuple) -> str:
        # An nnx.Param shows its array under one more attribute, which is no part of the parameter's name.
        return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def restore_into(template: Any, leaves: dict[str, Any]) -> Any:
    """The tree of `template` with its leaves replaced by name."""
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in named_leaves(template)])


def checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """The sum of each array's bits, read as integers, modulo 2^32.

    Integers add up to the same sum in any order, so a checkpoint may move to other devices; and the sum
    of a single changed number always differs. Orbax itself doesn't notice a flipped bit inside an array.
    """
    return {name: int(total) for name, total in jax.device_get(_bit_sums(leaves)).items()}


@jax.jit
def _bit_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(x: jax.Array) -> jax.Array:
        whole = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(whole.astype(jnp.uint32), dtype=jnp.uint32)

    return {name: total(x) for name, x in to_device(leaves).items()}


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: str | os.PathLike[str], config: CheckpointConfig):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        policy = policies.LatestN(config.keep)
        if config.keep_every:
            policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(config.keep_every)])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                # Partial checkpoints of a killed run.
                for rest in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(rest)
            barrier()
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policy,
                context=_as_json("data", "checksums"),
            )
        except OSError as error:
            raise as_user_error(error, self.folder) from error
        assert_equal_across_hosts(
            _steps(self.folder),
            f"The hosts of this job see different checkpoints in {self.folder}: give all the same --workdir, in a "
            "folder that they share.",
        )

    @property
    def latest(self) -> int | None:
        """The newest saved step."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, trees: dict[str, Any], iterator: Any) -> None:
        """Starts to save `trees` (by name, of arrays) and the state of `iterator` as step `step`, on all hosts at once.

        Returns when the arrays are copied to the host, so that the caller may donate them; the disk is
        written asynchronously. A save that failed raises at the next `save`, `wait` or `close`.

        Raises:
          UserError: the disk is full or read-only.
        """
        self.wait()
        self.check_space(trees, step)
        parts = {name: named_leaves(tree) for name, tree in trees.items()}
        sums = {name: checksums(leaves) for name, leaves in parts.items()}
        data = _merge(all_gather_json(iterator.get_state()))
        sums["data"] = {"state": _text_sum(data)}
        with _writing(self.folder / str(step)):
            self._checkpointer.save_checkpointables_async(
                step, parts | {"checksums": sums, "data": data}, force=True
            )

    def check_space(self, trees: dict[str, Any], step: int) -> None:
        """Raises UserError where the disk has no room for a checkpoint of `trees`, arrays or their shapes."""
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
        if shutil.disk_usage(self.folder).free < 1.05 * need:
            raise UserError(
                f"No space is left on the disk for checkpoint {self.folder / str(step)}, which needs "
                f"{need / 2**20:.0f} MB: free some and start again to continue from step {self.latest or 0}."
            )

    def restore(self, templates: dict[str, Any], iterator: Any) -> dict[str, Any]:
        """The trees of the newest checkpoint, and `iterator` set to the batch that comes next.

        Args:
          templates: by name, trees of jax.ShapeDtypeStruct with the shardings wanted.

        Raises:
          UserError: the checkpoint is of another architecture, or it can't be read.
        """
        folder = self.folder / str(self.latest)
        # The model first: where the architecture differs, it is the model's parameter that says so.
        order = sorted(templates, key=lambda name: name != "params")
        trees = {name: _load(folder, name, templates[name]) for name in order}
        iterator.set_state(_load_state(folder))
        return trees

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with _writing(self.folder):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases the threads."""
        with _writing(self.folder):
            self._checkpointer.close()


def _as_json(*names: str) -> Any:
    """Orbax's settings under which these are files of JSON: by itself it makes each of their numbers an array."""
    context, registry = ocp.Context(), ocp.handlers.local_registry()
    for name in names:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    return context


def _merge(states: list[Any]) -> Any:
    """The table of all shards; hosts that read the same shard are at the same place in it."""
    if len(states) == 1:
        return states[0]
    return {"shards": {shard: own for state in states for shard, own in state["shards"].items()}}


def _text_sum(state: Any) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _load_state(folder: pathlib.Path) -> Any:
    """The data iterator's state, as JSON gives it back."""
    with _reading(folder):
        found = ocp.load_checkpointables(folder, {"data": None, "checksums": None})
        if _text_sum(found["data"]) != found["checksums"]["data"]["state"]:
            raise OSError("the data's state is not what was saved")
        return found["data"]


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of the run in `workdir`.

    Raises:
      UserError: there is no run there, or its config.json is no JSON.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return with_new_names(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no training run: it has no config.json.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): put the run's configuration back in its place."
        ) from error


def keep_config(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    resumed: bool,
    complete: Callable[[Mapping[str, Any]], ConfigDict] = ConfigDict,
) -> None:
    """Writes `config` to workdir/config.json.

    Args:
      resumed: the workdir's run continues, so all but `FREE_TO_CHANGE` must be the same.
      complete: fills in the keys that an older run's file doesn't have.

    Raises:
      UserError: a resumed run's model, data or optimizer differ; the sentence names the keys.
    """
    path = pathlib.Path(workdir) / "config.json"
    new = json.loads(json.dumps(config))
    if resumed:
        was = read_config(workdir)
        old = _flat(json.loads(json.dumps(complete(was).to_dict())))
        now = _flat(new)
        changed = [
            key
            for key in sorted(old.keys() | now.keys())
            if not {key, key.split(".")[0]} & {*FREE_TO_CHANGE}
            and old.get(key, "absent") != now.get(key, "absent")
        ]
        if changed:
            words = "; ".join(
                f"{k} was {old.get(k, 'absent')} and is {now.get(k, 'absent')}" for k in changed[:5]
            )
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{workdir} holds a run of another configuration ({words}{more}): "
                "go on with its own, or choose another workdir."
            )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(new, indent=2) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def load_params(
    workdir: str | os.PathLike[str], template: Any = None, ema: bool = True, step: int | None = None
) -> Any:
    """The model of a training run, without its optimizer.

    Args:
      workdir: the run's folder.
      template: the model as `jax.eval_shape` gives it; without it, a table from names to numpy arrays.
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
        return jax.tree.map(np.asarray, _load(folder, name, _saved_shapes(folder, name)))
    return _load(folder, name, template)


def _saved_shapes(folder: pathlib.Path, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    with _reading(folder):
        table = ocp.metadata(folder, name).metadata
        # Orbax logs what it couldn't read and answers None.
        if not isinstance(table, dict):
            raise OSError(f"no shapes of {name}")
        return {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in table.items()}


def _load(folder: pathlib.Path, name: str, template: Any) -> Any:
    wanted, saved = named_leaves(template), _saved_shapes(folder, name)
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
            leaf.shape, saved[key].dtype, sharding=getattr(leaf, "sharding", None) or local
        )
        for key, leaf in wanted.items()
    }
    # Training builds its model under jit; files are read outside of it.
    with _reading(folder), jax.ensure_compile_time_eval():
        leaves = ocp.load_checkpointables(folder, {name: abstract})[name]
        sums = ocp.load_checkpointables(folder, {"checksums": None})["checksums"][name]
        changed = [key for key, total in checksums(leaves).items() if total != sums[key]]
        if changed:
            raise OSError(f"{name} {changed[0]!r} is not what was saved")
        arrays = {key: leaves[key].astype(leaf.dtype) for key, leaf in wanted.items()}
    return restore_into(template, arrays)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"


def newest_step(workdir: str | os.PathLike[str]) -> int:
    """The newest checkpoint's; 0: there is none."""
    return max(_steps(pathlib.Path(workdir) / "checkpoints"), default=0)


def _steps(parent: pathlib.Path) -> list[int]:
    # Orbax writes to a temporary folder and renames it, so a bare number is a complete checkpoint.
    return sorted(int(path.name) for path in parent.glob("*") if path.name.isdigit())


@contextlib.contextmanager
def _writing(place: pathlib.Path) -> Iterator[None]:
    """Turns errors while a checkpoint is written into one sentence."""
    try:
        yield
    except OSError as error:
        raise as_user_error(error, place) from error
    except Exception as error:
        # TensorStore has errors of its own, with the system's messages in them.
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            if os.strerror(code) in str(error):
                raise as_user_error(OSError(code, os.strerror(code)), place) from error
        raise


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns errors while a checkpoint is read into one sentence that says how to continue without it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        earlier = [step for step in _steps(folder.parent) if step < int(folder.name)]
        onward = (
            f"continue from step {earlier[-1]} ({folder.parent / str(earlier[-1])})"
            if earlier
            else "start again"
        )
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
        raise UserError(
            f"Checkpoint {folder} can't be read, it is truncated or damaged ({reason}): "
            f"delete that folder to {onward}."
        ) from error
