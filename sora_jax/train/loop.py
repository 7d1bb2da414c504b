"""The training loop. It knows objectives, not models: from a configuration to a trained state, top to bottom.

An objective has `init(key) -> model`, `loss(model, batch, key) -> (loss, metrics)`, `data(config, shard_index,
shard_count) -> grain.IterDataset`, `flops(batch) -> float`, `tokens(batch) -> (real, slots)` and
`sample_sheet(model, step) -> PIL.Image | None`. Models are NNX modules used as plain pytrees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax import mesh as meshes
from sora_jax.errors import UserError, atomic_path
from sora_jax.train import optim
from sora_jax.train.checkpoint import CheckpointConfig, Checkpoints, named_leaves, read_config
from sora_jax.train.metrics import MetricsWriter, Throughput, parameter_count, peak_flops

# What may change when a run goes on; anything else would make it another run.
FREE_TO_CHANGE = ("steps", "log", "checkpoint", "mesh", "stop_on_nan")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Steps between rows of metrics; between sample sheets (0: none); whether TensorBoard gets them too."""

    every: int = 50
    sheet_every: int = 0
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop itself reads of a configuration; the objective reads the rest."""

    objective: str
    steps: int
    seed: int = 0
    stop_on_nan: bool = True
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: meshes.MeshConfig = meshes.MeshConfig()
    optim: optim.OptimConfig = optim.OptimConfig()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "ema"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: steps done, model, optimizer state, averaged model (or None)."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any

    def trees(self) -> dict[str, Any]:
        """By the names that checkpoints give them."""
        trees = {"params": self.params, "optimizer": (self.step, self.opt_state), "ema": self.ema}
        return {name: tree for name, tree in trees.items() if tree is not None}


def train(config: ConfigDict, workdir: str | os.PathLike[str], objective: Any = None) -> TrainState:
    """Trains, or goes on training, until `config.steps`; returns the last state.

    The run lives in `workdir`: config.json, metrics.jsonl, checkpoints/, sheets/. A run that was stopped at any
    point goes on from its newest checkpoint to the same parameters, bit for bit, as one that never stopped.
    SIGTERM and Ctrl-C finish the step, save and return; a second Ctrl-C interrupts at once.

    Raises:
      UserError: a mistyped key, a workdir of another run, a loss that is not finite, a full disk.
    """
    workdir = pathlib.Path(workdir)
    loop = read_loop_config(config)
    if objective is None:
        from sora_jax.train.objectives import make_objective

        objective = make_objective(config)
    mesh = meshes.make_mesh(loop.mesh)
    checkpoints = Checkpoints(workdir, loop.checkpoint)
    keep_config(config, workdir, resumed=checkpoints.latest is not None)

    with jax.set_mesh(mesh), contextlib.closing(checkpoints), stop_signals() as stop:
        root = jax.device_put(jax.random.key(loop.seed), meshes.sharding(mesh, ""))
        init, step_fn = make_steps(objective, loop.optim)
        abstract = jax.eval_shape(init, root)
        placed = jax.tree.map(lambda leaf: meshes.parameter_sharding(mesh, leaf.shape), abstract)
        data = iter(objective.data(config, jax.process_index(), jax.process_count()))

        if checkpoints.latest is None:
            state = jax.jit(init, out_shardings=placed)(root)
        else:
            templates = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placed
            )
            trees = checkpoints.restore(templates.trees(), data)
            state = TrainState(
                *trees["optimizer"][:1], trees["params"], trees["optimizer"][1], trees.get("ema")
            )
        step = start = checkpoints.latest or 0
        update = jax.jit(step_fn, donate_argnums=0, out_shardings=(placed, meshes.sharding(mesh, "")))

        log = Log(workdir, loop, start, parameter_count(abstract.params))
        pending: Pending | None = None
        with contextlib.closing(log):
            while step < loop.steps and not stop.requested:
                before = time.perf_counter()
                rows = next_batch(data, step)
                waited = time.perf_counter() - before
                batch = meshes.place_rows(mesh, rows)
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, batch, root)
                step += 1
                if update._cache_size() > 1:
                    warnings.warn(
                        f"Step {step} compiled again: a batch changed its shapes or types.", stacklevel=1
                    )

                # The host reads step N - 1 while the devices do step N.
                if pending is not None:
                    log.read(pending, objective)
                pending = Pending(step, rows, metrics, waited)
                due = step % loop.checkpoint.every == 0 or step == loop.steps or stop.requested
                sheet_due = loop.log.sheet_every and step % loop.log.sheet_every == 0
                if due or sheet_due or step == start + 1:
                    # No state is saved whose loss was not seen to be finite.
                    log.read(pending, objective)
                    pending = None
                if due:
                    checkpoints.save(step, state.trees(), data)
                if sheet_due:
                    log.sheet(
                        step, objective.sample_sheet(state.params if state.ema is None else state.ema, step)
                    )
        checkpoints.wait()
    return state


def make_steps(objective: Any, config: optim.OptimConfig) -> tuple[Callable, Callable]:
    """The two pure functions of training: `init(key) -> TrainState`, `step(state, batch, key) -> (state, metrics)`.

    `key` is the root: every draw folds the step in, so no key is ever saved.
    """

    def init(key: jax.Array) -> TrainState:
        params = objective.init(jax.random.fold_in(key, 0))
        optimizer = optim.make_optimizer(config, params)
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step + 1)
        optimizer = optim.make_optimizer(config, state.params)
        (loss, metrics), gradients = jax.value_and_grad(objective.loss, has_aux=True)(
            state.params, batch, key
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else optim.ema_update(state.ema, params, config.ema_decay, state.step)
        own = {
            "loss": loss,
            "grad_norm": optax.global_norm(gradients),
            "learning_rate": optim.make_schedule(config)(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics | own

    return init, step


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and not yet looked at: its number, host batch, metrics, seconds of waiting."""

    step: int
    rows: Any
    metrics: dict[str, jax.Array]
    waited: float


class Log:
    """Reads each step's metrics, stops on those not finite, and tells: bar, metrics.jsonl, sheets."""

    def __init__(self, workdir: pathlib.Path, loop: LoopConfig, start: int, parameters: int):
        self.workdir, self.loop, self.start = workdir, loop, start
        self.writer = (
            MetricsWriter(workdir, start, loop.log.tensorboard) if jax.process_index() == 0 else None
        )
        self.throughput = Throughput(peak_flops())
        self.window: list[dict[str, float]] = []
        # Without a terminal each row of metrics is a line instead.
        self.bar = tqdm(total=loop.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.say(f"{parameters:,} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}")

    def say(self, line: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)

    def read(self, pending: Pending, objective: Any) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if self.loop.stop_on_nan and not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
            self.fail(pending, metrics)
        self.window.append(metrics)
        if pending.step == self.start + 1:
            # The first step is mostly compilation; what follows is the pace.
            self.throughput.read()
        else:
            self.throughput.add(
                *objective.tokens(pending.rows), objective.flops(pending.rows), pending.waited
            )
        self.bar.update()
        if pending.step % self.loop.log.every == 0 or pending.step == self.loop.steps:
            self.row(pending.step)

    def row(self, step: int) -> None:
        """Writes the means since the last row."""
        means = {name: float(np.mean([metrics[name] for metrics in self.window])) for name in self.window[-1]}
        figures = means | self.throughput.read()
        self.window.clear()
        if self.writer is not None:
            self.writer.write(step, figures)
        shown = {"loss": f"{figures['loss']:.4f}"}
        if "steps_per_second" in figures:
            left = (self.loop.steps - step) / figures["steps_per_second"]
            shown |= {
                "tokens/s": f"{figures['tokens_per_second']:.0f}",
                "utilisation": f"{figures['utilisation']:.1%}",
                "padding": f"{figures['padding']:.1%}",
                "left": tqdm.format_interval(left),
            }
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say(
                f"step {step}/{self.loop.steps} "
                + " ".join(f"{name} {value}" for name, value in shown.items())
            )

    def sheet(self, step: int, image: Any) -> None:
        if image is None or self.writer is None:
            return
        with atomic_path(self.workdir / "sheets" / f"step_{step:07d}.png") as path:
            image.save(path)
        self.writer.write_image(step, "sheet", image)

    def fail(self, pending: Pending, metrics: dict[str, float]) -> None:
        place = self.workdir / f"nan_batch_step{pending.step}.npz"
        with atomic_path(place) as path:
            np.savez(
                path, **{name.replace("/", "."): leaf for name, leaf in named_leaves(pending.rows).items()}
            )
        raise UserError(
            f"Training stopped at step {pending.step}: loss {metrics['loss']:g} and gradient norm "
            f"{metrics['grad_norm']:g} are not both finite; the batch is in {place}, the last good checkpoint stays: "
            "start again with a lower config.optim learning rate, or look at the batch."
        )

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def next_batch(data: Iterator[Any], step: int) -> Any:
    try:
        return next(data)
    except StopIteration:
        raise UserError(
            f"The data ended after {step} steps: repeat the data set, or set config.steps={step}."
        ) from None


def keep_config(config: ConfigDict, workdir: pathlib.Path, resumed: bool) -> None:
    """Writes workdir/config.json; on resume only where what makes the run what it is has stayed the same."""
    new = json.loads(json.dumps(config.to_dict()))
    if resumed:
        old, now = (
            _flat({k: v for k, v in c.items() if k not in FREE_TO_CHANGE})
            for c in (read_config(workdir), new)
        )
        changed = [
            key for key in sorted(old.keys() | now.keys()) if old.get(key, "absent") != now.get(key, "absent")
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
    if jax.process_index() == 0:
        with atomic_path(workdir / "config.json") as path:
            path.write_text(json.dumps(new, indent=2) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_loop_config(config: ConfigDict) -> LoopConfig:
    """The loop's part of a configuration.

    Raises:
      UserError: a key is mistyped or missing.
    """
    fields = {field.name: field for field in dataclasses.fields(LoopConfig)}
    for key in config:
        near = difflib.get_close_matches(key, fields, 1, 0.8)
        if key not in fields and near and near[0] not in config:
            raise UserError(f"config.{key} is no key of the configuration: did you mean config.{near[0]}?")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in config:
            nested = dataclasses.is_dataclass(field.default)
            values[name] = component(type(field.default), config[name], name) if nested else config[name]
        elif field.default is dataclasses.MISSING:
            raise UserError(f"The configuration has no {name!r}: set config.{name}.")
    return LoopConfig(**values)


def component(schema: type, values: Mapping[str, Any], name: str) -> Any:
    """A component's dataclass from its part of the configuration, `config.<name>`.

    Raises:
      UserError: a key that the component doesn't have, with the nearest that it has; or one that is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0)
            raise UserError(
                f"config.{name}.{key} is no key of {schema.__name__}: did you mean config.{name}.{near[0]}?"
            )
    try:
        return schema(**values)
    except TypeError as error:
        raise UserError(f"config.{name} is incomplete: {error}.") from error


class Stop:
    """Whether somebody asked the run to stop."""

    requested = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and the first SIGINT ask the loop to stop; a second SIGINT interrupts it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
