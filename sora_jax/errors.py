"""Errors with a message for the user, files that are complete or absent, and files that one process has at a time."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO

TEMPORARY, MAX_SUFFIX = ".tmp-", 16  # of temporary files: what their names begin with, letters of a suffix


class UserError(ValueError):
    """Something the user can fix: one clear sentence that says what, where and what to do.

    Commands print it as ``error: <sentence>`` and exit with status 2, without a traceback.
    """


def nearest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """Of `known` the name that is most like `name`; empty where none is `least` alike, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name, known, 1, least)), "")


def user_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path as people write it: "~" at its beginning is their home."""
    return pathlib.Path(os.path.expanduser(path))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the folder of `path` that replaces it only if the block succeeds.

    A block that fails leaves what was at `path` untouched and no temporary file; so does one during which the
    program is ended, by Ctrl-C or by a signal that would end it at once (SIGTERM, SIGHUP). Where `path` is a
    symbolic link, the file it points to is written.

    Raises:
      UserError: the folder can't be written, the name is too long or the disk is full.
    """
    asked, path = path, pathlib.Path(os.path.realpath(path))  # a link stays, and what it points to is written
    temporary: pathlib.Path | None = None
    with _ending_by_exception():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_names(path.parent, path)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=short_suffix(path))
            temporary = pathlib.Path(name)
            os.close(handle)
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except OSError as error:
            raise as_user_error(error, asked) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], waiting: str = "") -> Iterator[None]:
    """Holds a lock file while the block runs; another process that wants it waits until then.

    The system lets go of it when its process ends, however it ends. Where files can't be locked (Windows, some network
    file systems) nothing is held.

    Args:
      path: of the lock file, which is removed in the end.
      waiting: printed on stderr where another process holds it.

    Raises:
      UserError: the file can't be made.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as closing:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = closing.enter_context(open(path, "ab"))
            except OSError as error:
                raise as_user_error(error, path) from error
            if not _lock(file, wait=False):
                if waiting:
                    print(waiting, file=sys.stderr, flush=True)
                _lock(file)
            # Who had it before may have removed it: then it is a file that nobody else will ask for.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps files that are open
                path.unlink()


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Whether another process holds this lock file now."""
    try:
        with open(path, "r+b") as file:
            return not _lock(file, wait=False)
    except OSError:
        return False


def _lock(file: IO[bytes], wait: bool = True) -> bool:
    """Whether this process has the file for itself now, or the system can't say."""
    try:
        import fcntl  # there is none on Windows
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # of a file system without locks
        return True
    return True


def check_names(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Raises OSError where a name in `path` below `folder`, which exists, is longer than the disk's names may be."""
    for part in path.parts[len(folder.parts) :]:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder / part)


def short_suffix(path: pathlib.Path) -> str:
    """The suffix for a temporary file, whose name must not be longer than that of the file itself."""
    return path.suffix if len(path.suffix) <= MAX_SUFFIX else ""


@contextlib.contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Signals that would end the process at once raise SystemExit within the block, so that it can clean up."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Only the main thread may; and what the program already does about a signal stays.
    at_once = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        at_once = []
    for number in at_once:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in at_once:
            signal.signal(number, signal.SIG_DFL)


def as_user_error(error: OSError, path: str | os.PathLike[str]) -> UserError:
    """Turns the operating system's refusal to write `path` into a sentence."""
    if error.errno == errno.ENOSPC:
        return UserError(f"No space is left on the disk that holds {path}: free some, or write elsewhere.")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path} can't be written: its folder is read-only here; choose another place.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path} can't be written: a part of its path is a file, not a folder.")
    if error.errno == errno.ENAMETOOLONG:
        name = os.path.basename(path)
        short = name if len(name) <= 40 else f"{name[:37]}..."
        return UserError(f"{short} can't be written: its name or path is too long; choose a shorter one.")
    return UserError(f"{path} can't be written: {error.strerror or error}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
