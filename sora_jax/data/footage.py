"""Video files as a data set: clips of many durations, cut out of whatever lies in a folder."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from sora_jax.data.clips import Clip
from sora_jax.errors import UserError, atomic_path
from sora_jax.timing import frame_step
from sora_jax.video import Video, probe, resample, stream_frames

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
# Each file is cut into blocks of ten seconds, and of every ten blocks one is held out for validation: time
# apart, not clips apart, so that no frame of the one split is seen in the other.
BLOCK_SECONDS = 10.0
BLOCKS_PER_HELD_OUT = 10
HELD_OUT = 4


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of frames of one file that belongs wholly to one split: native frames first ... stop - 1."""

    file: str
    fps: float
    first: int
    stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.first


@dataclasses.dataclass(frozen=True)
class Footage:
    """Clips from a folder of video files (or one file), random-access, deterministic in (fields, index).

    A clip has the file's own aspect ratio, its rate (or, to stay within `max_fps`, every n-th of its frames),
    1 + 4k frames, and sides that are multiples of `multiple`, by cropping the middle. Its caption is the text
    in the `.txt` beside the file, empty where there is none. Files are opened once, at construction, for how
    long they are.

    Attributes:
      path: a folder, searched with its subfolders, or a file.
      resolution: pixels of the short side.
      min_seconds: the shortest clip that is not a picture.
      max_seconds: the longest; durations are drawn evenly between the two.
      max_fps: frames a second, at most.
      share_of_images: how many of the clips are one frame, 0 ... 1.
      split: "train" or "validation": disjoint blocks of ten seconds, every tenth held out.
      clips: the data set's length.
      seed: another one, other clips.
      multiple: of which both sides are multiples.
      crop: (frames, height, width) of every clip instead: a window at a random place of the frame, scaled to
        a random size. Durations and `resolution` then have no say.
      crop_short_side: in pixels, the range from which the short side of the scaled frame is drawn (evenly in
        its logarithm) before it is cropped; never less than the crop needs. None: `resolution`.
      cache: a folder in which each file is decoded once, at the largest size that is needed, and from then on
        read as a memory map; empty: every clip is decoded from the keyframe before it.

    Raises:
      UserError: a field makes no sense, there is no video at `path`, or one can't be read.
    """

    path: str
    resolution: int = 128
    min_seconds: float = 1.0
    max_seconds: float = 4.0
    max_fps: float = 24.0
    share_of_images: float = 0.0
    split: str = "train"
    clips: int = 10_000
    seed: int = 0
    multiple: int = 8
    crop: tuple[int, int, int] | None = None
    crop_short_side: tuple[int, int] | None = None
    cache: str = ""
    _spans: tuple[Span, ...] = dataclasses.field(init=False, repr=False, compare=False)
    _weights: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        headers = {str(file): probe(file) for file in _video_files(self.path)}
        files = {file: (known.fps, known.seconds) for file, known in headers.items()}
        spans = [span for span in _spans(files, self.split) if span.frames >= self._shortest(span)]
        if not spans:
            raise UserError(
                f"{self.path} holds no clip for the {self.split} split: its videos are shorter than "
                f"{self._least_seconds():.2g} seconds there; add longer ones or ask for shorter clips."
            )
        object.__setattr__(self, "_spans", tuple(spans))
        object.__setattr__(self, "_weights", tuple(itertools.accumulate(span.frames for span in spans)))
        if self.cache:
            for span in spans:
                self._cached(span)

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        rng = np.random.default_rng((self.seed, self.split == "train", index))
        span = self._spans[bisect.bisect_right(self._weights, rng.integers(self._weights[-1]))]
        step = self._step(span)
        count = self._draw_count(rng, span)
        first = span.first + int(rng.integers(span.frames - (count - 1) * step))
        scaled: list[np.ndarray] = []
        for frame in self._read(span, first, count):
            if not scaled:
                window = self._draw_window(rng, *frame.shape[:2])
            scaled.append(resample(frame, *window))
        if len(scaled) < count:
            raise UserError(
                f"{span.file} is damaged or cut off near {first / span.fps:.1f} seconds: mend it or take it away."
            )
        caption = _caption(span.file)
        name = (
            os.path.relpath(span.file, self.path) if os.path.isdir(self.path) else os.path.basename(span.file)
        )
        return Clip(
            Video(np.stack(scaled), span.fps / step),
            {"short": caption},
            ((0.0, caption),) if caption else (),
            f"{name}@{first / span.fps:.3f}s+{count}",
        )

    def _check(self) -> None:
        crop, sides = self.crop, self.crop_short_side
        demands = {
            "split is train or validation": self.split in ("train", "validation"),
            "min_seconds is above 0 and not above max_seconds": 0 < self.min_seconds <= self.max_seconds,
            "max_fps is above 0": self.max_fps > 0,
            "share_of_images lies within 0 ... 1": 0 <= self.share_of_images <= 1,
            "clips and multiple are at least 1": min(self.clips, self.multiple) >= 1,
            "resolution is at least multiple": self.resolution >= self.multiple,
            "crop is (frames, height, width), with 1 + 4k frames": crop is None
            or (len(crop) == 3 and min(crop) >= 1 and crop[0] % 4 == 1),
            "crop_short_side is (low, high)": sides is None
            or (len(sides) == 2 and 1 <= sides[0] <= sides[1]),
        }
        for demand, met in demands.items():
            if not met:
                raise UserError(f"The footage in {self.path} can't be used as asked: see that {demand}.")

    def _least_seconds(self) -> float:
        return self.min_seconds if self.crop is None else self.crop[0] / self.max_fps

    def _step(self, span: Span) -> int:
        return frame_step(span.fps, self.max_fps)

    def _grid(self, seconds: float, span: Span) -> int:
        """How many frames of 1 + 4k fit into so many seconds."""
        return 1 + 4 * max(0, math.floor((seconds * span.fps / self._step(span) + 1e-6 - 1) / 4))

    def _shortest(self, span: Span) -> int:
        """Native frames that a span must have for a clip to be cut out of it."""
        count = self._grid(self.min_seconds, span) if self.crop is None else self.crop[0]
        return (count - 1) * self._step(span) + 1

    def _draw_count(self, rng: np.random.Generator, span: Span) -> int:
        if rng.random() < self.share_of_images:
            return 1
        if self.crop is not None:
            return self.crop[0]
        seconds = rng.uniform(self.min_seconds, self.max_seconds)
        longest = 1 + (span.frames - 1) // self._step(span) // 4 * 4
        return min(self._grid(seconds, span), longest)

    def _short_sides(self) -> tuple[int, int]:
        """The range of the short side, in pixels, to which frames are scaled before they are cropped."""
        if self.crop is None or self.crop_short_side is None:
            return self.resolution, self.resolution
        low, high = self.crop_short_side
        return low, high

    def _draw_window(
        self, rng: np.random.Generator, height: int, width: int
    ) -> tuple[int, int, tuple[float, float, float, float]]:
        """(height, width) of the clip, and the box (left, top, right, bottom) of the frame that it shows."""
        low, high = self._short_sides()
        short = low if low == high else math.exp(rng.uniform(math.log(low), math.log(high)))
        scale = short / min(height, width)
        if self.crop is None:
            y, x = (int(side * scale + 1e-6) // self.multiple * self.multiple for side in (height, width))
            top, left = (height - y / scale) / 2, (width - x / scale) / 2
        else:
            y, x = self.crop[1:]
            scale = max(scale, y / height, x / width)
            top, left = rng.random() * (height - y / scale), rng.random() * (width - x / scale)
        if scale == 1:
            # Whole pixels stay what they are.
            top, left = round(top), round(left)
        top, left = max(top, 0), max(left, 0)
        return y, x, (left, top, min(left + x / scale, width), min(top + y / scale, height))

    def _read(self, span: Span, first: int, count: int) -> Iterator[np.ndarray]:
        step = self._step(span)
        if self.cache:
            return iter(self._cached(span)[first : first + (count - 1) * step + 1 : step])
        shown = stream_frames(span.file, first / span.fps, fps=span.fps / step)
        return (frame for _, frame in itertools.islice(shown, count))

    def _cached(self, span: Span) -> np.ndarray:
        """The file's frames as a memory map, uint8[T,Y,X,3]; written first where it is not there yet."""
        stat = os.stat(span.file)
        need = max(self._short_sides()[1], *(self.crop[1:] if self.crop else (0,)))
        name = hashlib.sha256(repr((os.path.abspath(span.file), stat.st_size, stat.st_mtime_ns)).encode())
        path = pathlib.Path(self.cache, f"{pathlib.Path(span.file).stem}-{name.hexdigest()[:12]}-{need}.npy")
        if not path.exists():
            _write_frames(path, span, need)
        return np.load(path, mmap_mode="r")


def _write_frames(path: pathlib.Path, span: Span, short_side: int) -> None:
    """Decodes a whole file into an array on disk, one frame in memory at a time; frames are never enlarged."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        header, count = {"descr": "|u1", "fortran_order": False, "shape": (0, 0, 0, 3)}, 0
        for _, frame in stream_frames(span.file, fps=span.fps):
            height, width = frame.shape[:2]
            scale = min(1.0, short_side / min(height, width))
            if scale < 1:
                frame = resample(frame, int(height * scale + 1e-6), int(width * scale + 1e-6))
            if count == 0:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, *frame.shape)})
            file.write(frame.tobytes())
            count += 1
        file.seek(0)
        # The header leaves room for its first number to grow.
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *frame.shape)})


def _video_files(path: str) -> list[pathlib.Path]:
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"There is no folder or file {path}: check the name.")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no video: put files there that end in {', '.join(SUFFIXES)}.")
    return files


def _spans(files: dict[str, tuple[float, float]], split: str) -> Iterator[Span]:
    """The runs of blocks that belong to `split`; blocks are numbered through all files in order."""
    number = 0
    for file, (fps, seconds) in files.items():
        if not math.isfinite(seconds):
            raise UserError(f"{file} does not say how long it is: write it anew as mp4 and use that.")
        frames = math.floor(seconds * fps + 1e-3)
        blocks = max(1, math.ceil(frames / fps / BLOCK_SECONDS - 1e-6))
        bounds = [min(frames, round(block * BLOCK_SECONDS * fps)) for block in range(blocks + 1)]
        held_out = [(number + block) % BLOCKS_PER_HELD_OUT == HELD_OUT for block in range(blocks)]
        for held, group in itertools.groupby(range(blocks), key=held_out.__getitem__):
            if held == (split == "validation"):
                run = list(group)
                yield Span(file, fps, bounds[run[0]], bounds[run[-1] + 1])
        number += blocks


def _caption(file: str) -> str:
    path = pathlib.Path(file).with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption {path} can't be read: {error}; save it as UTF-8 text.") from error
