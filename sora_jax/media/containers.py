"""Files as FFmpeg opens them: by path, never by address."""

from __future__ import annotations

import os
from typing import Any

import av
from av.video.reformatter import Interpolation

Path = str | os.PathLike[str]

PACKET = 188  # bytes of one of an MPEG transport stream, which begins with a "G"

# Without these the conversion between RGB and YUV rounds down: a bias of one level in 256.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


def open_container(path: Path, mode: str = "r", **options: Any) -> Any:
    """PyAV's container of a file; a context manager.

    Args:
      path: the file, whatever its name begins with: without a protocol of its own "12:30.mp4" would be one of the
        protocol "12".
      mode: "r" or "w".
      **options: as `av.open`'s.

    Raises:
      av.FFmpegError, OSError: it can't be opened.
    """
    name = f"file:{os.fspath(path)}"
    try:
        return av.open(name, mode, **options)
    except av.EOFError:
        if mode != "r" or not _is_transport_stream(path):
            raise
        return av.open(name, mode, **{"format": "mpegts"} | options)


def _is_transport_stream(path: Path) -> bool:
    """Whether a file is of MPEG's packets, of which FFmpeg doesn't take a few for a stream."""
    with open(path, "rb") as file:
        return set(file.read(100 * PACKET)[::PACKET]) == {ord("G")}
