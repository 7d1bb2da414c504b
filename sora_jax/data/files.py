"""Which files of a folder are videos, and the words beside them."""

from __future__ import annotations

import pathlib

from sora_jax.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif")


def find_files(path: str) -> list[pathlib.Path]:
    """The video files of a folder and its subfolders, in order of their names; a file is itself.

    Raises:
      UserError: there is no such path, or no video in it.
    """
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"There is no folder or file {path}: check the name.")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no video: put files there that end in {', '.join(SUFFIXES)}.")
    return files


def read_caption(file: str) -> str:
    """The words in the `.txt` beside a video file, on one line; empty where there is none.

    Raises:
      UserError: it can't be read, or is no UTF-8 text.
    """
    path = pathlib.Path(file).with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption {path} can't be read: {error}; save it as UTF-8 text.") from error
