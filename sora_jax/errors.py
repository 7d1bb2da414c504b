"""Errors that are written for the person who reads them, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can mend: one clear sentence that says what, where and what to do.

    Commands print it as ``error: <sentence>`` and exit with status 2, without a traceback.
    """


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` that takes its place only if the block succeeds.

    A block that fails leaves whatever stood at `path` untouched and nothing beside it.

    Raises:
      UserError: the folder can't be written or the disk is full.
    """
    path = pathlib.Path(path)
    temporary: pathlib.Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = pathlib.Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise as_user_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def as_user_error(error: OSError, path: str | os.PathLike[str]) -> UserError:
    """Turns the operating system's refusal to write `path` into a sentence."""
    if error.errno == errno.ENOSPC:
        return UserError(f"No space is left on the disk that holds {path}: free some, or write elsewhere.")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path} can't be written: its folder is read-only here; choose another place.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path} can't be written: a part of its path is a file, not a folder.")
    return UserError(f"{path} can't be written: {error.strerror or error}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
