"""Which files of a folder are videos and pictures to train on, and their captions."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from sora_jax.errors import UserError, user_path
from sora_jax.media.texts import read_text

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".m2v", ".vob", ".ts"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".mxf", ".y4m", ".gif", ".apng"),
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
CAPTION = ".txt"
# Texts about a folder and not about a file, which are ignored.
DOCUMENTS = (".md", ".rst")
DOCUMENT_TITLES = ("readme", "license", "licence", "notice", "copying")

# Names that file systems, cameras and archives add; hidden ones begin with a dot.
FOREIGN = (
    "@eadir",
    "@recycle",
    "#recycle",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "lost+found",
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is in a folder and its subfolders.

    Attributes:
      files: videos and pictures, in order of their names.
      captions: of each file that has one, the `.txt` of the same name.
      posters: pictures left out because a video of the folder has the same name.
      alone: captions whose video or picture isn't there.
      others: how many files there are of other kinds, by suffix; documents (`DOCUMENTS`) aren't counted.
      closed: folders that can't be listed, and why.
    """

    files: tuple[pathlib.Path, ...]
    captions: dict[pathlib.Path, pathlib.Path]
    posters: tuple[pathlib.Path, ...] = ()
    alone: tuple[pathlib.Path, ...] = ()
    others: dict[str, int] = dataclasses.field(default_factory=dict)
    closed: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict)


def find_files(path: str | os.PathLike[str]) -> Found:
    """The videos and pictures of a folder and its subfolders, or one file, each with its caption.

    Kinds are recognised by suffix, in capitals or not. Hidden files and folders are left out, and those that systems
    make (`FOREIGN`). Links are followed; a folder or file that is reached twice is taken once.

    Raises:
      UserError: there is no such path, or nothing to learn from in it.
    """
    root = user_path(path)
    if root.is_file():
        texts = [file for file in root.parent.iterdir() if _suffix(file) == CAPTION]
        return Found((root,), _pair([root], texts))
    if not root.is_dir():
        raise UserError(f"There is no folder or file {path}: check the name.")
    closed: dict[pathlib.Path, str] = {}
    every = sorted(file for file in _list(root, set(), closed) if not _is_document(file))
    videos = [file for file in every if _suffix(file) in VIDEOS]
    titles = {_title(source_file) for source_file in videos}
    pictures = [file for file in every if _suffix(file) in PICTURES]
    posters = [picture for picture in pictures if _title(picture) in titles]
    files = sorted({*videos, *pictures} - {*posters})
    if not files:
        raise UserError(
            f"{path} holds no video or picture: put files there that end in {', '.join(VIDEOS + PICTURES)}"
            + "".join(f"; {folder} {reason}" for folder, reason in closed.items())
            + "."
        )
    texts = [file for file in every if _suffix(file) == CAPTION]
    captions = _pair(files, texts)
    others: dict[str, int] = {}
    for file in every:
        if _suffix(file) not in (*VIDEOS, *PICTURES, CAPTION):
            others[_suffix(file) or "no suffix"] = others.get(_suffix(file) or "no suffix", 0) + 1
    alone = sorted({*texts} - {*captions.values()})
    return Found(tuple(files), captions, tuple(posters), tuple(alone), others, closed)


def read_caption(path: str | os.PathLike[str]) -> str:
    """A caption on one line.

    Raises:
      UserError: it can't be read, or is no text.
    """
    return " ".join(read_text(path).split())


def _list(folder: pathlib.Path, seen: set[str], closed: dict[pathlib.Path, str]) -> list[pathlib.Path]:
    """All files below, by the first path that leads to each; `seen` takes what they are without links."""
    seen.add(os.path.realpath(folder))
    files: list[pathlib.Path] = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        closed[folder] = f"can't be listed: {error.strerror}"
        return []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in FOREIGN:
            continue
        # A link to nothing is a file that can't be read: it will be named.
        if (real := os.path.realpath(entry)) in seen:
            continue
        if entry.is_dir():
            files += _list(entry, seen, closed)
        elif entry.is_file() or entry.is_symlink():
            seen.add(real)
            files.append(entry)
    return files


def _pair(files: list[pathlib.Path], texts: list[pathlib.Path]) -> dict[pathlib.Path, pathlib.Path]:
    """Of each file the text of the same name; one that ends in small letters goes before one in capitals."""
    by_title = {_title(text): text for text in sorted(texts)}
    return {file: by_title[_title(file)] for file in files if _title(file) in by_title}


def _is_document(file: pathlib.Path) -> bool:
    named = file.stem.lower() in DOCUMENT_TITLES and _suffix(file) in ("", CAPTION)
    return named or _suffix(file) in DOCUMENTS


def _title(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix("")


def _suffix(file: pathlib.Path) -> str:
    return file.suffix.lower()
