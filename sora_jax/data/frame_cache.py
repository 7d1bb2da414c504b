"""Video files decoded once: each becomes an array on disk, from which clips are read at any place."""

from __future__ import annotations

import pathlib

import numpy as np

from sora_jax.errors import UserError, atomic_path
from sora_jax.media.digests import file_digest
from sora_jax.media.video import Report, resample, stream_frames


class Unreadable(UserError):
    """A video file is damaged."""


def cached_frames(folder: str, file: str, fps: float, short_side: int) -> np.ndarray:
    """The file's frames as a memory map, uint8[T,Y,X,3]; written first where it is not there yet.

    What is kept is named by the file's content: a file that was changed is decoded again, one that was moved isn't.

    Args:
      folder: of the cache, one file for each video file and short side.
      file: the video file.
      fps: the even rate of its frames.
      short_side: in pixels; frames are scaled down to it, never up.

    Raises:
      Unreadable: a frame can't be decoded whole.
      UserError: the folder can't be written.
    """
    path = pathlib.Path(folder, f"{pathlib.Path(file).stem}-{file_digest(file)}-{fps:g}-{short_side}.npy")
    if not path.exists():
        _write_frames(path, file, fps, short_side)
    return np.load(path, mmap_mode="r")


def _write_frames(path: pathlib.Path, video: str, fps: float, short_side: int) -> None:
    """Decodes a whole file into an array on disk, one frame in memory at a time; frames are never enlarged."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        report = Report()
        header, count = {"descr": "|u1", "fortran_order": False, "shape": (0, 0, 0, 3)}, 0
        for _, frame in stream_frames(video, fps=fps, report=report, nearest=False):
            height, width = frame.shape[:2]
            scale = min(1.0, short_side / min(height, width))
            if scale < 1:
                frame = resample(frame, int(height * scale + 1e-6), int(width * scale + 1e-6))
            if count == 0:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *frame.shape)})
            file.write(frame.tobytes())
            count += 1
        if report.lost or not count:
            raise Unreadable(f"{video} has {len(report.lost)} frames that can't be decoded whole.")
        file.seek(0)
        # The header leaves room for its first number to grow.
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *frame.shape)})
