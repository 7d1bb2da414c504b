"""States of captions kept on disk, so that a prompt that was encoded once doesn't need its text encoder again."""

from __future__ import annotations

import pathlib

import numpy as np

from sora_jax.errors import atomic_path
from sora_jax.media.digests import value_digest


class StateFiles:
    """A file for each caption, named by its tokens, in a folder named by the encoder's content."""

    def __init__(self, folder: pathlib.Path, encoder_digest: str, width: int) -> None:
        self._folder = folder / encoder_digest
        self._width = width

    def read(self, ids: tuple[int, ...]) -> np.ndarray | None:
        """The states f32[m,E] of a caption; None where there are none, or none that can be read."""
        try:
            states_me = np.load(self._path(ids), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if states_me.shape != (len(ids), self._width) or states_me.dtype != np.float32:
            return None
        states_me.setflags(write=False)
        return states_me

    def write(self, ids: tuple[int, ...], states_me: np.ndarray) -> None:
        """Keeps a caption's states f32[m,E].

        Raises:
          UserError: the folder can't be written.
        """
        with atomic_path(self._path(ids)) as temporary, open(temporary, "wb") as file:
            np.save(file, states_me)

    def _path(self, ids: tuple[int, ...]) -> pathlib.Path:
        return self._folder / f"{value_digest(list(ids))}.npy"
