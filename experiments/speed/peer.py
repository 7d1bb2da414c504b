"""Talks to peers/worker.py, which runs in a Python that has torch."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import click

WORKER = pathlib.Path(__file__).parent / "peers" / "worker.py"


class Peer:
    """A process that does on request what it is asked, one thing at a time."""

    def __init__(self, python: str) -> None:
        """Starts it.

        Raises:
          ClickException: it doesn't start, say for want of torch.
        """
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | quiet,
        )
        self.torch: str = self._answer()["torch"]

    def build(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The ways of doing the work, each called once: see peers/worker.py."""
        return self._ask(asked)

    def seconds(self, way: str) -> float:
        """Of one more call."""
        return self._ask({"time": way})["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # it ended: its last words are the answer
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        reason = (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]
        raise click.ClickException(f"PyTorch's side ended ({reason}): give --torch a Python that has torch.")
