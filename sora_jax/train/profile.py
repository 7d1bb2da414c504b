"""`log.profile_steps`: a JAX profile of some steps, for XProf, TensorBoard's profile plugin or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Profiler:
    """Records a profile of `steps` = (first, count) into workdir/profile, on the first host alone.

    It is written to workdir/profile.partial and moved when it is complete. Where it can't be written, a sentence says
    so and training goes on.

    Args:
      steps: empty: nothing is recorded.
      say: prints a line.
    """

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, ...], say: Callable[[str], None]) -> None:
        self.folder, self._partial, self._say = workdir / "profile", workdir / "profile.partial", say
        first, count = steps if steps and jax.process_index() == 0 else (0, 0)
        self._first, self._last = first, first + count - 1
        self._recording = False

    def before(self, step: int) -> None:
        """Starts recording where `step`, the next one to be dispatched, is the first."""
        if step == self._first:
            with self._warning():
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
                jax.profiler.start_trace(self._partial)
                self._recording = True

    def after(self, step: int, outputs: Any) -> None:
        """Where `step` is the last one, waits for its `outputs` and writes the profile."""
        if self._recording and step >= self._last:
            jax.block_until_ready(outputs)
            with self._warning():
                self._stop()
                shutil.rmtree(self.folder, ignore_errors=True)
                self._partial.rename(self.folder)
                self._say(f"the profile of steps {self._first} to {self._last} is in {self.folder}")

    def close(self) -> None:
        """Drops what is being recorded of a run that ended before the last step."""
        if self._recording:
            with self._warning():
                self._stop()
                raise RuntimeError("the run ended before")

    def _stop(self) -> None:
        self._recording = False
        jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # XLA's profiler raises errors of its own
            shutil.rmtree(self._partial, ignore_errors=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            self._say(
                f"warning: no profile of steps {self._first} to {self._last} in {self.folder} ({reason}): free some "
                "space there, or set config.log.profile_steps=(); training isn't affected."
            )
