"""What names contents: files, arrays and plain values. Caches are kept under these, so that an edit is never missed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from sora_jax.errors import UserError

_LENGTH = 16


def file_digest(path: str | os.PathLike[str]) -> str:
    """Names a file's content: SHA-256 of all of it.

    It is read whole, once a process for each state of the file: at some 1 GB/s, or as fast as the disk is. A state is
    its size, inode and times; the system sets the last one (`ctime`) at each change, whatever a program sets.

    Raises:
      UserError: it can't be read.
    """
    try:
        stat = os.stat(path)
        return _file_digest(
            os.path.abspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        )
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from error


def value_digest(value: Any) -> str:
    """Names a value that JSON can write; the order of keys doesn't matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def array_digest(arrays: Iterable[Any]) -> str:
    """Names arrays by their types, shapes and numbers."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:_LENGTH]


@functools.lru_cache(maxsize=1 << 16)
def _file_digest(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_LENGTH]
