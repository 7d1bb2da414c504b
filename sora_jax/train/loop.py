"""The training loop. It knows objectives (`train.protocol`), not models: from a configuration to a trained state.

The same program runs on every host (`distributed.hosts`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sora_jax.checkpoints.store import Checkpoints, keep_config, named_leaves, newest_step
from sora_jax.config import complete
from sora_jax.distributed.hosts import assert_equal_across_hosts, barrier, failure_hint
from sora_jax.distributed.mesh import (
    Share,
    batch_share,
    make_mesh,
    on_host,
    parameter_shardings,
    place_batch,
    sharding,
    to_device,
)
from sora_jax.errors import UserError, atomic_path
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.train.averages import power_update, save_snapshot
from sora_jax.train.heldout import HeldOut
from sora_jax.train.loop_config import LoopConfig, read_loop_config
from sora_jax.train.metrics import RunLog, StepStats, parameter_count
from sora_jax.train.optim import OptimConfig, ema_update, make_optimizer, make_schedule, stop_frozen
from sora_jax.train.profile import Profiler
from sora_jax.train.protocol import Objective
from sora_jax.train.stopping import any_host_stopping, stop_signals


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "ema", "long_ema"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: steps done, model, optimizer state, averaged models (or None)."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    long_ema: Any = None

    def trees(self) -> dict[str, Any]:
        """By the names that checkpoints give them."""
        averages = {"ema": self.ema, "long_ema": self.long_ema}
        trees = {"params": self.params, "optimizer": (self.step, self.opt_state)} | averages
        return {name: tree for name, tree in trees.items() if tree is not None}

    @property
    def shown(self) -> Any:
        """The model that is measured and sampled from: the average, the model itself where none is kept."""
        return self.params if self.ema is None else self.ema

    @classmethod
    def of(cls, trees: dict[str, Any]) -> TrainState:
        """The inverse of `trees`."""
        step, opt_state = trees["optimizer"]
        return cls(step, trees["params"], opt_state, trees.get("ema"), trees.get("long_ema"))


def train(config: ConfigDict, workdir: str | os.PathLike[str], objective: Objective) -> TrainState:
    """Trains `objective`, or goes on training, until `config.steps`; returns the last state.

    The run lives in `workdir`: config.json, metrics.jsonl, checkpoints/, averages/, sheets/, profile/. A run that was
    stopped at any point goes on from its newest checkpoint to the same parameters, bit for bit, as one never stopped.
    SIGTERM and Ctrl-C finish the step, save and return; a second one ends the run at once. Of several hosts any may be
    signalled: all stop, at the same step. They share `workdir`, in which host 0 alone writes, but for checkpoints.

    Raises:
      UserError: a mistyped key, a workdir of another run, a loss that is not finite, a full disk.
    """
    workdir = pathlib.Path(workdir)
    loop = read_loop_config(config)
    config = complete(objective.schema, config)
    mesh = make_mesh(loop.mesh)
    share = batch_share(mesh)
    checkpoints = Checkpoints(workdir, loop.checkpoint)
    failure_hint(lambda: _advice(workdir))
    if jax.process_index() == 0:
        resumed = checkpoints.latest is not None
        keep_config(workdir, config.to_dict(), resumed, functools.partial(complete, objective.schema))
    barrier()
    assert_equal_across_hosts(
        (workdir / "config.json").exists(),
        f"Not every host of this job sees {workdir}: give all the same --workdir, in a folder that they share.",
    )

    with contextlib.ExitStack() as closing:
        closing.enter_context(contextlib.closing(checkpoints))
        root = jax.jit(lambda: jax.random.key(loop.seed), out_shardings=sharding(mesh, ""))()
        init, step_fn = make_steps(objective, loop.optim)
        with jax.set_mesh(mesh):
            abstract = jax.eval_shape(init, root)
        placed = parameter_shardings(mesh, abstract)
        if loop.optim.offload:
            placed = dataclasses.replace(placed, opt_state=on_host(placed.opt_state))
        # What the run will need is tried before the long work.
        step = start = checkpoints.latest or 0
        checkpoints.check_space(abstract.trees(), min(start + loop.checkpoint.every, loop.steps))
        if loop.log.sheet_every:
            try_sheet()
        size = parameter_count(abstract.params)
        log = RunLog(workdir, loop.log, start, loop.steps, size, share.copies, config.to_dict())
        closing.enter_context(contextlib.closing(log))
        # What a host does for itself, such as encoding clips, happens outside of the mesh.
        data = iter(objective.data(config, share))
        frozen = place_frozen(objective, mesh)
        heldout = prepare_heldout(objective, mesh, share, root, loop, start, log, frozen)
        update = jax.jit(step_fn, donate_argnums=0, out_shardings=(placed, sharding(mesh, "")))

        if start:
            templates = jax.tree.map(lambda leaf, kept: leaf.update(sharding=kept), abstract, placed)
            state = TrainState.of(checkpoints.restore(templates.trees(), data))
        else:
            initial = getattr(objective, "initial", None)
            given = () if initial is None else (jax.device_put(initial, placed.params),)
            del initial
            with jax.set_mesh(mesh):
                state = jax.jit(init, out_shardings=placed, donate_argnums=range(1, 1 + len(given)))(
                    root, *given
                )
            del given

        profiler = Profiler(workdir, loop.log.profile_steps, log.say)
        closing.enter_context(contextlib.closing(profiler))
        log.begin(objective.data_summary)
        pending: Pending | None = None
        stopping, compiled = False, 1
        # Until here there is nothing to save, and encoding a data set may take long: a signal ends that at once.
        with stop_signals() as stop:
            while step < loop.steps and not stopping:
                profiler.before(step + 1)
                before = time.perf_counter()
                own_batch = next_batch(data, step)
                waited = time.perf_counter() - before
                batch = place_batch(mesh, own_batch)
                # Only tracing, in the first step, may build constants on the host.
                guard = jax.transfer_guard("disallow" if step > start else "allow")
                stop_asked = any_host_stopping(mesh, stop)
                with jax.set_mesh(mesh), guard:
                    state, metrics = update(state, batch, root, *frozen)
                step += 1
                profiler.after(step, metrics)
                if update._cache_size() > compiled:
                    compiled = update._cache_size()
                    warnings.warn(
                        f"Step {step} compiled again: a batch changed its shapes or types.", stacklevel=1
                    )

                # The host looks at step N - 1 while the devices do step N.
                if pending is not None:
                    flush_step(pending, objective, log, loop.stop_on_nan)
                    stopping = bool(pending.stop)
                if jax.process_count() == 1:
                    stopping = stop.requested
                pending = Pending(step, own_batch, metrics, waited, stop_asked)
                save_due = stopping or step % loop.checkpoint.every == 0 or step == loop.steps
                sheet_due = loop.log.sheet_every > 0 and step % loop.log.sheet_every == 0
                heldout_due = heldout is not None and step % loop.log.heldout_every == 0
                if heldout is not None and heldout_due:
                    log.heldout(*heldout.measure(state.shown))
                snapshot_due = step % loop.optim.ema_every == 0 or step == loop.steps
                snapshot_due &= bool(loop.optim.ema_lengths)
                if save_due or sheet_due or heldout_due or snapshot_due:
                    # Nothing is saved or shown of a step whose loss was not seen to be finite.
                    flush_step(pending, objective, log, loop.stop_on_nan)
                    stopping |= bool(pending.stop)
                    save_due |= stopping
                    pending = None
                if snapshot_due:
                    save_snapshots(workdir, mesh, state, loop.optim.ema_lengths, step)
                if save_due:
                    checkpoints.save(step, state.trees(), data)
                if sheet_due:
                    log.sheet(step, draw_sheet(objective, mesh, state, step, log, frozen))
        checkpoints.wait()
        log.end(step)
    return state


def make_steps(objective: Objective, config: OptimConfig) -> tuple[Callable, Callable]:
    """Training as pure functions: `init(key) -> TrainState`, `step(state, batch, key, *frozen) -> (state, metrics)`.

    `key` is the root: every draw folds the step in, so no key is ever saved. `init` takes a model to begin with too.
    """

    def init(key: jax.Array, *given: Any) -> TrainState:
        [params] = given or [objective.init(jax.random.fold_in(key, 0))]
        optimizer = make_optimizer(config, params)
        copy = lambda kept: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params) if kept else None
        ema, long_ema = copy(config.ema_decay or config.ema_lengths), copy(config.ema_lengths)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, long_ema)

    def step(
        state: TrainState, batch: Any, key: jax.Array, *frozen: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step + 1)
        optimizer = make_optimizer(config, state.params)
        loss_of = lambda params: objective.loss(stop_frozen(config, params), batch, key, *frozen)
        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        opt_state = to_device(state.opt_state) if config.offload else state.opt_state
        updates, opt_state = optimizer.update(gradients, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema, long_ema = state.ema, state.long_ema
        if config.ema_lengths:
            ema, long_ema = (
                power_update(average, params, length, state.step)
                for average, length in zip((ema, long_ema), config.ema_lengths, strict=True)
            )
        elif ema is not None:
            ema = ema_update(ema, params, config.ema_decay, state.step)
        own = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": make_schedule(config)(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, ema, long_ema), metrics | own

    return init, step


def place_frozen(objective: Objective, mesh: Mesh) -> tuple[Any, ...]:
    """What the loss takes besides and nothing changes, on its devices: at most one tree, as an argument of the step.

    A constant in the step would be written into its program.
    """
    frozen = getattr(objective, "frozen", None)
    return () if frozen is None else (jax.device_put(frozen, parameter_shardings(mesh, frozen)),)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step dispatched and not yet checked: number, host batch, metrics, seconds of waiting, whether to stop."""

    step: int
    batch: Any
    metrics: dict[str, jax.Array]
    waited: float
    stop: Any


def flush_step(pending: Pending, objective: Objective, log: RunLog, stop_on_nan: bool) -> None:
    """Fetches the metrics of a step, logs them, and stops the run where they are not finite.

    Raises:
      UserError: loss or gradient norm are not finite; the batch is kept in the workdir.
    """
    metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    if stop_on_nan and not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
        place = log.workdir / f"nan_batch_step{pending.step}{host}.npz"
        with atomic_path(place) as path:
            leaves = named_leaves(pending.batch)
            np.savez(path, **{name.replace("/", "."): leaf for name, leaf in leaves.items()})
        raise UserError(
            f"Training stopped at step {pending.step}: loss {metrics['loss']:g} and gradient norm "
            f"{metrics['grad_norm']:g} are not both finite; the batch is in {place}, the last good "
            "checkpoint stays: start again with a lower learning rate (config.optim), or look at the batch."
        )
    real, positions = objective.tokens(pending.batch)
    stats = StepStats(real, positions, objective.flops(pending.batch), pending.waited)
    log.step(pending.step, metrics, stats)


def _advice(workdir: pathlib.Path) -> str:
    step = newest_step(workdir)
    onward = f"the run goes on from step {step} of {workdir}" if step else "the run begins again"
    return f"start all hosts again: {onward}."


def prepare_heldout(
    objective: Objective,
    mesh: Mesh,
    share: Share,
    root: jax.Array,
    loop: LoopConfig,
    start: int,
    log: RunLog,
    frozen: Sequence[Any] = (),
) -> HeldOut | None:
    """What measures the held-out loss; None where none is due from step `start` on, or nothing is held out."""
    every = loop.log.heldout_every
    if not every or start // every == loop.steps // every:
        return None
    if batches := objective.heldout_data(share, loop.log.heldout_batches):
        return HeldOut(objective, mesh, batches, root, frozen)
    log.say("no held-out loss: the data have no validation split, or too little for one")
    return None


def try_sheet() -> None:
    """Raises UserError where sheets can't be drawn here."""
    try:
        contact_sheet([Video(np.zeros((1, 16, 16, 3), np.uint8), 8.0)], ["a sheet"])
    except Exception as error:  # anything that the drawing library is missing
        raise UserError(
            f"Sheets of samples can't be drawn ({type(error).__name__}: {error}): reinstall pillow, or set "
            "config.log.sheet_every=0."
        ) from error


def draw_sheet(
    objective: Objective, mesh: Mesh, state: TrainState, step: int, log: RunLog, frozen: Sequence[Any] = ()
) -> PIL.Image.Image | None:
    """The objective's sheet of samples. Of several hosts the first draws it, on one device that holds all the model.

    A sheet that can't be drawn doesn't end the run: the log says why there is none.
    """

    def sample(model: Any, *frozen: Any) -> PIL.Image.Image | None:
        try:
            return objective.sample_sheet(model, step, *frozen)
        except Exception as error:
            log.say(f"no sheet of samples at step {step}: {type(error).__name__}: {error}")
            return None

    if jax.process_count() == 1:
        with jax.set_mesh(mesh):
            return sample(state.shown, *frozen)
    whole = [gathered(mesh, tree) for tree in (state.shown, *frozen)]
    sheet = sample(*whole) if jax.process_index() == 0 else None
    barrier()
    return sheet


def save_snapshots(
    workdir: pathlib.Path, mesh: Mesh, state: TrainState, lengths: Sequence[float], step: int
) -> None:
    """Keeps the two power-function averages as they are now (`train.averages`). Of several hosts the first writes."""
    for average, length in zip((state.ema, state.long_ema), lengths, strict=True):
        whole = average if jax.process_count() == 1 else gathered(mesh, average)
        if jax.process_index() == 0:
            save_snapshot(workdir, whole, length, step)


def gathered(mesh: Mesh, model: Any) -> Any:
    """All of a model on one device of each host."""
    whole = jax.jit(lambda model: model, out_shardings=sharding(mesh, ""))(model)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def next_batch(data: Iterator[Any], step: int) -> Any:
    try:
        return next(data)
    except StopIteration:
        raise UserError(
            f"The data ended after {step} steps: repeat the data set, or set config.steps={step}."
        ) from None
