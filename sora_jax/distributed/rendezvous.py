"""Rendezvous of the hosts of a job, a watch on lost hosts, and an all-gather of JSON: over TCP, without JAX.

Host 0 listens at the job's address until all have joined; then `jax.distributed` starts there, and the connections stay
open. A host that loses another one, or that ends with an error, reports it to the others, and each ends with a
one-sentence error and status 2.

Why not by JAX alone? Tried with two processes over gloo, JAX 0.12.0.1 and 0.10.2, public functions only:

- A host that never joins: `jax.distributed.initialize` doesn't raise after `initialization_timeout`; the process is
  aborted in C++ (SIGABRT, some 15 lines), and nothing says which host is missing.
- A host that is killed or hangs: the others are aborted the same way (30 lines) once the heartbeat is missed, six
  seconds later with `heartbeat_timeout_seconds=10`; all at once where it is host 0. So are they where a host ends with
  an error of its own, and the host itself, as it waits for them on its way out. No public call reports it before.
- `jax_enable_recoverability` with `multihost_utils.live_devices` in a thread does report that another host is gone or
  hangs, also by heartbeat, but not where it is host 0: there all are aborted still. JAX calls both experimental.
- `multihost_utils.process_allgather` would do for `all_gather_json` once all have joined, however long one
  waits (7 minutes tried); at the first call hosts may be 2 minutes apart at most, else all are aborted. As it is a
  program for the devices, it starts only after the current training step, which the host must not wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from sora_jax.errors import UserError


def connect_hosts(address: str, count: int, index: int, wait: float, about: Any) -> dict[int, socket.socket]:
    """Waits for the other hosts; returns the connections to them by number: host 0 has all, the others host 0's.

    Args:
      address: HOST:PORT of host 0.
      count, index: how many hosts there are, and which this one is.
      wait: seconds.
      about: a JSON-able value that must be host 0's on all.

    Raises:
      UserError: a host never joined, or was started in another way than host 0.
    """
    hello = {"host": index, "hosts": count, "about": about}
    until = time.monotonic() + wait
    if index == 0:
        return _gather(address, hello, until, wait)
    name, _, port = address.rpartition(":")
    reason = "no connection yet"
    while (left := until - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((name.strip("[]"), int(port)), timeout=left)
            peer.sendall(json.dumps(hello).encode() + b"\n")
            # Host 0 waits as long as this one, and may have begun later.
            peer.settimeout(left + 5)
            answer = json.loads(_line(peer))
            if answer == {"go": count}:
                return {0: peer}
            if "refused" in answer:
                raise UserError(answer["refused"])
        except UserError:
            raise
        except ConnectionRefusedError:
            reason = "connection refused"
        except (OSError, ValueError, TypeError) as error:
            reason = str(error) or type(error).__name__
        time.sleep(min(0.2, max(left, 0)))
    raise UserError(
        f"Host {index} could not reach host 0 at {address} within {wait:g} s ({reason}): start host 0, check the "
        "address and that its port can be reached from here, or wait longer with --join_timeout."
    )


def _gather(address: str, hello: dict[str, Any], until: float, wait: float) -> dict[int, socket.socket]:
    count, port = hello["hosts"], int(address.rpartition(":")[2])
    peers: dict[int, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"Host 0 can't listen at port {port} ({error.strerror}): choose another in --coordinator, the same on all."
        ) from error
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in peers)
                sentence = (
                    f"Host 0 waited {wait:g} s at {address} and of {count} hosts these never joined: {missing}. Start "
                    "all with the same --coordinator and --hosts, each with its own --host; or wait longer with "
                    "--join_timeout."
                )
                _send(list(peers.values()), {"refused": sentence})
                raise UserError(sentence) from None
            peer.settimeout(5.0)
            try:
                other = json.loads(_line(peer))
                number = int(other["host"])
                refused = _refusal(hello, other, number in peers and _alive(peers[number]))
            except (OSError, ValueError, TypeError, KeyError):
                peer.close()  # not a host of this job
                continue
            if refused:
                _send([peer], {"refused": refused})
            else:
                peers[number] = peer
    _send(list(peers.values()), {"go": count})
    return dict(sorted(peers.items()))


def _refusal(hello: dict[str, Any], other: dict[str, Any], is_alive: bool) -> str | None:
    number, count = other["host"], hello["hosts"]
    if other["hosts"] != count or not 0 < number < count:
        return f"Host {number} was started as one of {other['hosts']} and host 0 as one of {count}: give all the same."
    if is_alive:
        return f"There is a host {number} of this job already: give each host a --host of its own."
    if other["about"] != hello["about"]:
        return (
            f"Host {number} was started with another configuration or version than host 0: start all alike."
        )
    return None


def _send(peers: list[socket.socket], message: dict[str, Any]) -> None:
    for peer in peers:
        # A host that is gone is detected by the watch.
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps(message).encode() + b"\n")


def _alive(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _line(peer: socket.socket) -> bytes:
    """Reads up to the end of a line, and no byte more: what follows is read by the watch."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            raise ConnectionResetError("it closed the connection")
        line += byte
    return line


class Watch(threading.Thread):
    """Receives heartbeats and messages of other hosts (host 0 of all, others of host 0); ends this one on a loss."""

    def __init__(self, peers: dict[int, socket.socket], host: int, timeout: float):
        super().__init__(name="hosts", daemon=True)
        self.advice: Callable[[], str] = lambda: "start the job again."
        self._peers, self._host, self._timeout = peers, host, timeout
        self._done: set[int] = set()
        self._values: dict[int, queue.SimpleQueue[Any]] = {number: queue.SimpleQueue() for number in peers}
        self._lock = threading.Lock()
        self.start()

    def broadcast(self, message: Any, but: int | None = None) -> None:
        with self._lock:
            _send([peer for number, peer in self._peers.items() if number != but], message)

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every host's value, in their order, once all have called this: host 0 gathers them."""
        if self._host:
            self.broadcast({"value": value})
            return self._values[0].get()
        values = [value, *(self._values[number].get() for number in sorted(self._peers))]
        self.broadcast({"value": values})
        return values

    def leave(self) -> None:
        self._done.update(self._peers)
        self.broadcast({"done": self._host})

    def run(self) -> None:
        interval = min(self._timeout / 6, 10.0)
        last_seen, buffers = dict.fromkeys(self._peers, time.monotonic()), dict.fromkeys(self._peers, b"")
        selector, last_sent = selectors.DefaultSelector(), 0.0
        for number, peer in self._peers.items():
            peer.settimeout(self._timeout)
            selector.register(peer, selectors.EVENT_READ, number)
        while set(self._peers) - self._done:
            for key, _ in selector.select(interval):
                last_seen[key.data] = time.monotonic()
                *lines, buffers[key.data] = (buffers[key.data] + self._read(key, selector)).split(b"\n")
                for line in lines:
                    self._on_message(key.data, json.loads(line))
            if time.monotonic() - last_sent > interval:
                last_sent = time.monotonic()
                self.broadcast(None)
            for number in set(self._peers) - self._done:
                if time.monotonic() - last_seen[number] > self._timeout:
                    self._report_lost(
                        number, f"is gone: no heartbeat for {self._timeout:g} s (--host_timeout)"
                    )

    def _read(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> bytes:
        peer = typing.cast(socket.socket, key.fileobj)
        try:
            data = peer.recv(65536)
        except OSError:
            data = b""
        if not data:
            selector.unregister(peer)
            if key.data not in self._done:
                self._report_lost(key.data, "is gone: its connection closed")
        return data

    def _on_message(self, number: int, message: Any) -> None:
        if message is None:
            return
        if "done" in message:
            self._done.add(number)
        elif "value" in message:
            self._values[number].put(message["value"])
        elif "lost" in message:
            self._fail(message["lost"])
        else:
            self._report_lost(number, f"ended with an error ({message['ended'].rstrip('.')})")

    def _report_lost(self, number: int, what: str) -> NoReturn:
        sentence_of_loss = f"Another host of this job, host {number}, {what}"
        self.broadcast({"lost": sentence_of_loss}, but=number)
        self._fail(sentence_of_loss)

    def _fail(self, sentence_of_loss: str) -> NoReturn:
        # Not through Python's own streams, which the main thread may have locked.
        sentence = f"{sentence_of_loss}; {self.advice()}"
        os.write(2, f"{chr(10) if os.isatty(2) else ''}error: {sentence}\n".encode())
        end_process(2)


def end_process(status: int) -> NoReturn:
    """Ends it at once: exit handlers of libraries would wait for the hosts that are gone."""
    sys.stdout.flush()
    os._exit(status)
