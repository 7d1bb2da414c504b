"""Several hosts: the same program, started once on each, joined into one job.

The hosts connect (`rendezvous`, which says why), then start `jax.distributed` at the same address. Messages between
them go over those connections, not over the devices, and may wait for as long as it takes.

A host is a process: under SLURM or Open MPI there may be several on a machine, one a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from sora_jax.distributed.rendezvous import Watch, connect_hosts, end_process
from sora_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "SORA_JAX_HOSTS", "SORA_JAX_HOST"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a job; each field has a flag of its name in `python -m sora_jax.train`.

    Attributes:
      coordinator: HOST:PORT of host 0, which the others can reach; else from JAX_COORDINATOR_ADDRESS.
      hosts: how many, or "auto": what a TPU pod, SLURM, Open MPI or Kubernetes says; else from SORA_JAX_HOSTS; 1: this
        process alone.
      host: which of them this is, from 0; else from SORA_JAX_HOST.
      join_timeout: seconds that hosts wait for each other at the start.
      host_timeout: seconds without a heartbeat after which a host is taken for gone; where a process dies and its
        machine stays up, the others know at once.
    """

    coordinator: str = ""
    hosts: str = ""
    host: str = ""
    join_timeout: float = 300.0
    host_timeout: float = 60.0

    @property
    def count(self) -> str:
        """`hosts`, or the environment's."""
        return self.hosts or os.environ.get(COUNT, "1")

    def find(self) -> tuple[str, int, int]:
        """Address, number of hosts and this one's, from the fields, the environment or the cluster.

        Raises:
          UserError: something is missing or no number, or no known cluster is found.
        """
        if self.count == "auto":
            # No public call returns this without joining at once, which ends the process where a host is missing.
            from jax._src.clusters import ClusterEnv

            try:
                address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, None, int(self.join_timeout)
                )
            except RuntimeError as error:
                raise UserError(f"--hosts=auto can't find the hosts of this cluster: {error}.") from error
            if address is None or count is None or index is None:
                raise UserError(
                    "--hosts=auto finds no TPU pod, SLURM, Open MPI or Kubernetes here: name the hosts with "
                    "--coordinator=HOST:PORT --hosts=2 --host=0."
                )
            return address, count, index
        count = _whole(self.count, "--hosts", 1)
        if count == 1:
            return "", 1, 0
        address = self.coordinator or os.environ.get(ADDRESS, "")
        name, _, port = address.rpartition(":")
        if not name or not port.isdecimal() or int(port) > 65535:
            raise UserError(
                f"--coordinator={address} is no address of host 0: write it as HOST:PORT, or set {ADDRESS}."
            )
        index = _whole(self.host or os.environ.get(INDEX, ""), "--host", 0)
        if index >= count:
            raise UserError(f"--host={index} is none of --hosts={count}: they are 0 to {count - 1}.")
        return address, count, index


def _whole(text: str, flag: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{flag}={text} is no whole number of {least} or more: give the number of hosts, and this one's."
        )
    return int(text)


def join(config: Hosts, about: Any = None) -> int:
    """Joins this process to the others of its job, before anything else is asked of JAX; returns which one it is.

    Args:
      about: a JSON-able value that must be the same on all hosts, such as the configuration.

    Raises:
      UserError: a host never joined, or was started in another way than host 0.
    """
    global _watch
    address, count, index = config.find()
    if count == 1:
        return 0
    peers = connect_hosts(address, count, index, config.join_timeout, about)
    _watch = Watch(peers, index, config.host_timeout)
    # SIGTERM is handled in `train.stopping`; gloo is what collectives between CPUs of several hosts need.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        count,
        index,
        # Otherwise JAX takes a SLURM task's number for its GPU's where the user named the hosts.
        cluster_detection_method=None if config.count == "auto" else "deactivate",
        initialization_timeout=int(config.join_timeout),
        # Later than the watch's, which ends a process with an error message, where JAX aborts it.
        heartbeat_timeout_seconds=int(3 * config.host_timeout) + 10,
        shutdown_timeout_seconds=int(config.host_timeout) + 10,
    )
    return index


def all_gather_json(value: Any) -> list[Any]:
    """Every host's JSON-able value, in their order; returns when all have called it. All must, in the same order.

    Raises:
      UserError: JAX has other processes, which weren't joined by `join`.
    """
    if _watch is not None:
        return _watch.all_gather_json(value)
    if jax.process_count() > 1:
        raise UserError(
            "This process was joined to others by jax.distributed.initialize: call sora_jax.distributed.hosts.join "
            "instead, or start training with --hosts."
        )
    return [value]


def barrier() -> None:
    """Returns when all hosts have called it."""
    all_gather_json(None)


def assert_equal_across_hosts(value: Any, sentence: str) -> None:
    """Raises UserError(sentence), on every host, where `value` is not the same on all."""
    values = all_gather_json(value)
    if any(other != values[0] for other in values):
        raise UserError(sentence)


def leave() -> None:
    """Leaves the job when this process's work is done; returns when all have done theirs."""
    global _watch
    if _watch is not None:
        barrier()
        _watch.leave()
        _watch = None
        jax.distributed.shutdown()


def failure_hint(advice: Callable[[], str]) -> None:
    """Sets the advice that is appended to the error when a host is lost; called at that time."""
    if _watch is not None:
        _watch.advice = advice


def fail(status: int, error: BaseException, traceback: bool = False) -> None:
    """Reports to the other hosts that this one fails, and ends it; returns where there are no others.

    Exit handlers are skipped: JAX's would wait for the others.
    """
    if _watch is not None:
        _watch.broadcast({"ended": str(error).strip() or type(error).__name__})
        if traceback:
            sys.excepthook(type(error), error, error.__traceback__)
        end_process(status)


def wait_for_loss_report(seconds: float = 5.0) -> None:
    """Waits in case another host's end caused an error on this one: then the watch ends this process."""
    if _watch is not None:
        time.sleep(seconds)


_watch: Watch | None = None
