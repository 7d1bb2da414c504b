"""Ending a run on request: signals, and how several hosts agree on the step.

JAX's own way, `multihost_utils.reached_preemption_sync_point`, hears SIGTERM alone, and Ctrl-C is to save a run too; it
needs several hosts, and a handler is needed for one in any case. A flag among the step's arrays costs no waiting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.distributed.mesh import MESH_AXES, sharding


class Stop:
    """Whether the run was asked to stop."""

    requested = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """The first SIGTERM or SIGINT asks the loop to stop; a second one ends it at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        stop.requested = True
        restore()
        # A handler may interrupt a write to sys.stderr, which can't be written to then.
        os.write(2, b"\nfinishing this step, then saving; the same again ends at once\n")

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing waits to be saved: it ends a run as Ctrl-C does, which can say so."""


@contextlib.contextmanager
def terminations() -> Iterator[None]:
    """SIGTERM raises `Terminated`, but where `stop_signals` asks for a tidy end."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def any_host_stopping(mesh: Mesh, stop: Stop) -> jax.Array | bool:
    """Whether any host is asked to stop: known to all when the devices have come so far, so at the same step."""
    if jax.process_count() == 1:
        return stop.requested
    flags = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    own = np.full(jax.local_device_count(), stop.requested)
    asked = jax.make_array_from_process_local_data(flags, own, (jax.device_count(),))
    return _any(mesh)(asked)


@functools.cache
def _any(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=sharding(mesh, ""))
