"""The clips of a folder of videos, ours or another model's: which there are, and their frames as they are measured."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from sora_jax.data.files import find_files, read_caption
from sora_jax.data.survey import count, few
from sora_jax.errors import UserError, user_path
from sora_jax.evaluation.metrics import check_finite
from sora_jax.media.digests import file_digest
from sora_jax.media.video import Report, frame_count, probe, resample, stream_frames
from sora_jax.media.writing import read_metadata

ARRAYS = ".npy"


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What part of each file is a clip, and to what it is brought.

    Attributes:
      frames: how many, following each other.
      fps: resample to so many a second; None keeps a file's own. Arrays (`.npy`) tell no rate: it is theirs.
      size: (height, width) to scale to, cropped in the middle to that aspect ratio; None keeps a file's own.
      per_video: clips of a file, from its beginning to its end evenly; one begins with its first frame.
    """

    frames: int = 16
    fps: float | None = None
    size: tuple[int, int] | None = None
    per_video: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1 or self.per_video < 1:
            raise UserError("A clip has at least one frame, and a file gives at least one clip.")


@dataclasses.dataclass(frozen=True)
class ClipFile:
    """One clip of a folder.

    Attributes:
      path, name: its file, and its path in the folder.
      start: seconds into the file.
      fps: frames a second; None where the file tells none.
      size: (height, width) as measured.
      digest: names the file's content.
      caption: what it should show; "" where nothing says.
    """

    path: pathlib.Path
    name: str
    start: float
    fps: float | None
    size: tuple[int, int]
    digest: str
    caption: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix, by which clips of two folders are paired."""
        return pathlib.PurePosixPath(self.name).with_suffix("").as_posix()


def list_clips(
    folder: str | os.PathLike[str], settings: ClipSettings, captions: bool = False
) -> list[ClipFile]:
    """The clips of a folder and its subfolders, in order of their names; their headers are read, nothing is decoded.

    Videos, pictures (clips of one frame) and arrays (`.npy`: uint8 or floats in 0..1, [T,Y,X,3]) are taken. A caption
    is the `.txt` of the same name, or the prompt in a video's metadata; they are read where `captions` says so.

    Raises:
      UserError: there is no such folder, nothing in it, a file can't be read, some are too short, or some have no
        caption where these are read.
    """
    root = user_path(folder)
    if not root.is_dir():
        raise UserError(f"There is no folder {folder}: check the name.")
    arrays = sorted(path for path in root.rglob(f"*{ARRAYS}") if not path.name.startswith("."))
    try:
        found = find_files(root)
    except UserError:
        if not arrays:
            raise
        files, texts = arrays, {}
    else:
        files, texts = sorted([*found.files, *arrays]), found.captions
    texts |= {path: text for path in arrays if (text := path.with_suffix(".txt")).is_file()}
    clips: list[ClipFile] = []
    short: list[str] = []
    silent: list[str] = []
    for path in files:
        name = path.relative_to(root).as_posix()
        frames, fps, size = _look(path, settings)
        if frames < settings.frames:
            short.append(f"{name} ({frames})")
            continue
        caption = (read_caption(texts[path]) if path in texts else _prompt(path)) if captions else ""
        if captions and not caption:
            silent.append(name)
        own, digest = settings.size or size, file_digest(path)
        starts = np.linspace(0, frames - settings.frames, settings.per_video).astype(int)
        if settings.per_video == 1:
            starts = starts[:1]
        clips += [
            ClipFile(path, name, int(at) / (fps or 1.0), fps, own, digest, caption)
            for at in dict.fromkeys(starts)
        ]
    if short:
        raise UserError(
            f"{count(len(short), 'file')} in {folder} have fewer than the {settings.frames} frames of a clip: "
            f"{few(short)}; take shorter clips (--frames), or move them away."
        )
    if silent:
        raise UserError(
            f"{count(len(silent), 'file')} in {folder} have no caption: {few(silent)}; put what each should show into "
            "a .txt of its name, or leave clip_score out."
        )
    return clips


def read_clip(clip: ClipFile, settings: ClipSettings) -> tuple[np.ndarray, tuple[str, ...]]:
    """The frames uint8[T,Y,X,3] of a clip, and what should be known of them.

    Raises:
      UserError: the file can't be read, ends early, or has values that are no numbers.
    """
    if clip.path.suffix == ARRAYS:
        first = round(clip.start * (clip.fps or 1.0))
        frames = _array(clip.path)[first : first + settings.frames]
        return _fit(iter(_as_bytes(frames, clip.name)), clip, settings), ()
    report = Report()
    moments = stream_frames(clip.path, clip.start, clip.fps, report)
    shown = _fit(itertools.islice((frame for _, frame in moments), settings.frames), clip, settings)
    end = clip.start + settings.frames / (clip.fps or 1.0)
    return shown, (*report.remarks(), *report.damage(clip.start, end))


def describe_shapes(clips: Sequence[ClipFile]) -> str:
    """ "64×64 at 8 fps", or how many there are of each."""
    kinds = collections.Counter((clip.size, clip.fps) for clip in clips).most_common()
    names = [(describe_shape(*kind), number) for kind, number in kinds]
    return names[0][0] if len(names) == 1 else few([f"{number} of {name}" for name, number in names])


def describe_shape(size: tuple[int, int], fps: float | None) -> str:
    """ "64×48 at 8 fps", width first."""
    return f"{size[1]}×{size[0]}" + (f" at {fps:g} fps" if fps else ", of no rate")


def check_alike(clips: Sequence[ClipFile], others: Sequence[ClipFile], metrics: Sequence[str]) -> None:
    """Raises UserError where clips that are compared have different sizes or rates, which is said and never mended."""
    kinds = {(clip.size, clip.fps) for clip in (*clips, *others)}
    if len(kinds) < 2:
        return
    size, fps = collections.Counter((clip.size, clip.fps) for clip in (*others, *clips)).most_common(1)[0][0]
    against = f", those of the reference {describe_shapes(others)}" if others else ""
    ask = [f"--size {size[1]}x{size[0]}"] if len({kind[0] for kind in kinds}) > 1 else []
    ask += [f"--fps {fps or 8:g}"] if len({kind[1] for kind in kinds}) > 1 else []
    raise UserError(
        f"{', '.join(metrics)} compare clips of one size and rate, and these are {describe_shapes(clips)}{against}: "
        f"pass {' '.join(ask)} to have all resampled to it."
    )


def _look(path: pathlib.Path, settings: ClipSettings) -> tuple[int, float | None, tuple[int, int]]:
    """(frames, frames a second, size) of a file at the rate asked for."""
    if path.suffix == ARRAYS:
        array = _array(path)
        return len(array), settings.fps, (array.shape[1], array.shape[2])
    known = probe(path)
    if known.still:
        return 1, settings.fps or known.fps, known.size
    fps = settings.fps or known.fps
    if settings.fps is None and known.frames:
        return known.frames, fps, known.size
    return frame_count(known.seconds, fps), fps, known.size


def _array(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read as an array ({error}): write it again with numpy.save."
        ) from error
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(f"{path} is no clip [T,Y,X,3], but {list(array.shape)}: write one file a clip.")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{path} is of {array.dtype}: clips are of uint8, or of floats in 0..1.")
    return array


def _as_bytes(frames: np.ndarray, name: str) -> np.ndarray:
    if frames.dtype == np.uint8:
        return np.asarray(frames)
    frames = np.asarray(frames, np.float32)
    check_finite(frames, name)
    low, high = float(frames.min()), float(frames.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(f"{name} is of floats in {low:.4g}..{high:.4g}, not in 0..1: rescale it.")
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _fit(frames: Iterator[np.ndarray], clip: ClipFile, settings: ClipSettings) -> np.ndarray:
    """Frames stacked, each brought to the size asked for."""
    out = []
    for frame in frames:
        if frame.shape[:2] != clip.size:
            if settings.size is None:
                raise UserError(
                    f"{clip.name} changes its size within the clip: pass --size to bring all to one."
                )
            frame = resample(frame, *clip.size, _middle(frame.shape[:2], clip.size))
        out.append(frame)
    if len(out) < settings.frames:
        raise UserError(
            f"{clip.name} has {len(out)} of the {settings.frames} frames of a clip from {clip.start:g} seconds on: it "
            "ends earlier than its header says; take shorter clips (--frames), or move it away."
        )
    return np.stack(out)


def _middle(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of the wanted aspect ratio in the middle: (left, top, right, bottom)."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    height, width = wanted[0] * scale, wanted[1] * scale
    top, left = (size[0] - height) / 2, (size[1] - width) / 2
    return left, top, left + width, top + height


def _prompt(path: pathlib.Path) -> str:
    if path.suffix == ARRAYS:
        return ""
    try:
        return str(read_metadata(path).get("prompt", ""))
    except UserError:
        return ""
