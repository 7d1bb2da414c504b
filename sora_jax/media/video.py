"""A video as frames and a rate: read from files, written to files, resized."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from sora_jax.errors import UserError, atomic_path, user_path
from sora_jax.media.containers import Path
from sora_jax.media.decoding import Header, decoded, displayed_size, header, pixels
from sora_jax.media.pictures import moving_frames, moving_notes, moving_picture, opaque, read_picture
from sora_jax.media.timing import even_rate, evenly
from sora_jax.media.writing import STREAMED, kind_of, write_container, write_gif, write_picture

SHOWN = 192  # pixels of the short side, at least, where a notebook shows a video


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Video:
    """Frames and their rate; a picture is a video of one frame.

    Attributes:
      frames: uint8[T,Y,X,3], RGB.
      fps: frames a second.
      metadata: how it was made (prompt, seed, model, settings); written into files.

    Raises:
      UserError: the frames are not such an array, or the rate is not a positive number.
    """

    frames: np.ndarray
    fps: float
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise UserError(
                f"A video's frames are uint8[T,Y,X,3], none of these empty, but these are "
                f"{frames.dtype}{list(frames.shape)}."
            )
        fps = float(self.fps)
        if not (math.isfinite(fps) and fps > 0):
            raise UserError(f"A video's rate is a positive number of frames a second, not {self.fps}.")
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "fps", fps)

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        return f"Video({_in_short(self)})"

    @property
    def duration(self) -> float:
        """Seconds for which the frames are on show."""
        return len(self.frames) / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    def save(
        self, path: Path, crf: int = 16, metadata: Mapping[str, str] | Literal["own"] | None = "own"
    ) -> pathlib.Path:
        """Writes the file whose kind the suffix of `path` names, and returns its path.

        `.mp4` is H.264 4:2:0, and 4:4:4 where a side is odd, because 4:2:0 has only even ones (not every browser
        plays 4:4:4); `.webm` is VP9; both are tagged BT.709. `.gif` loops for ever. `.png` and `.jpg` (or `.jpeg`)
        are the one frame, or up to eight side by side.

        Args:
          path: where to.
          crf: x264's constant rate factor: 0 is lossless, 16 is good, 28 is small. A webm gets VP9's equivalent.
          metadata: what the file is to say of how it was made, such as its prompt and seed: "own" is what the
            video carries, None nothing; `writing.read_metadata` reads it.

        Raises:
          UserError: the suffix is another, or the place can't be written.
        """
        path, suffix = kind_of(path)
        metadata = self.metadata if metadata == "own" else metadata
        if suffix in STREAMED:
            return write_frames(path, self.frames, self.fps, crf, metadata)
        with atomic_path(path) as temporary:
            if suffix == ".gif":
                write_gif(temporary, self.frames, self.fps, metadata)
            else:
                write_picture(temporary, self._strip(), suffix, metadata)
        return path

    def _repr_html_(self) -> str:
        """As a notebook shows it: small frames are magnified by a whole number, with sharp pixels."""
        times = math.ceil(SHOWN / min(self.size))
        size = f'width="{times * self.size[1]}" height="{times * self.size[0]}" style="image-rendering: pixelated"'
        file = io.BytesIO()
        if len(self) == 1:
            write_picture(file, self._strip(), ".png")
            return f'<img {size} src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
        write_container(file, self.frames, self.fps, crf=18)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<video {size} controls autoplay loop muted src="data:video/mp4;base64,{data}"></video>'

    def _strip(self) -> np.ndarray:
        return np.concatenate(self.frames[evenly_spread(len(self), 8)], axis=1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VideoStream:
    """A video whose frames come one by one, and once: made, read or written while they are asked for.

    Attributes:
      frames: uint8[Y,X,3] each.
      count: how many they are.
      size: (height, width) in pixels.
      fps: frames a second.
      metadata: as `Video.metadata`.
    """

    frames: Iterator[np.ndarray]
    count: int
    size: tuple[int, int]
    fps: float
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"VideoStream({_in_short(self)})"

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames

    @property
    def duration(self) -> float:
        """Seconds for which the frames are on show."""
        return self.count / self.fps

    def whole(self) -> Video:
        """The frames that are left, all at once.

        Raises:
          UserError: none is.
        """
        frames = list(self.frames)
        if not frames:
            raise UserError("This video's frames have been read, and they come once: make it again.")
        return Video(np.stack(frames), self.fps, self.metadata)

    def save(
        self, path: Path, crf: int = 16, metadata: Mapping[str, str] | Literal["own"] | None = "own"
    ) -> pathlib.Path:
        """As `Video.save`; of an `.mp4` or `.webm` a few frames at a time are held, of others all."""
        path, suffix = kind_of(path)
        metadata = self.metadata if metadata == "own" else metadata
        if suffix in STREAMED:
            return write_frames(path, self.frames, self.fps, crf, metadata)
        return self.whole().save(path, crf, metadata)


def _in_short(video: Video | VideoStream) -> str:
    frames = "1 frame" if len(video) == 1 else f"{len(video)} frames"
    return f"{frames}, {video.size[1]}x{video.size[0]}, {video.fps:g} fps"


@dataclasses.dataclass
class Report:
    """What was met while a file was read; pass one to `stream_frames` to hear of it.

    Attributes:
      name: what messages call the file.
      fps, seconds: as `probe` gives them.
      lost: seconds of the frames that could not be decoded whole.
      uneven, transparent, sizes: of the frames read so far, sizes as stored.
      high_range: whether the colours are HDR, which look pale when they are read as others.
      end: where the last frame ends, in seconds, once all are read; infinity before.
      notes: what was left out, or looks otherwise here.
    """

    name: str = ""
    fps: float = 1.0
    seconds: float = math.nan
    lost: list[float] = dataclasses.field(default_factory=list)
    uneven: bool = False
    transparent: bool = False
    sizes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    high_range: bool = False
    end: float = math.inf
    notes: tuple[str, ...] = ()

    def remarks(self) -> tuple[str, ...]:
        """Sentences on what the frames read so far are, where that changes how they look here."""
        found = {
            "changes its size midway: all frames were brought to that of the first.": len(self.sizes) > 1,
            "is transparent in places: it was put on white.": self.transparent,
        }
        sentences = [*self.notes, *(sentence for sentence, true in found.items() if true)]
        return tuple(f"{self.name} {sentence}" for sentence in sentences)

    def damage(self, start: float = 0.0, end: float = math.inf) -> tuple[str, ...]:
        """Sentences on what is missing between two times; none where all is there that should be."""
        sentences = []
        if lost := sum(start - 1 / self.fps < second < end for second in self.lost):
            sentences.append(
                f"{self.name} is damaged: {lost} frames could not be decoded whole; what was left of them, or the "
                f"frame before, stands in."
            )
        # Headers may count the sound's last bit too.
        if self.seconds - self.end > max(3 / self.fps, 0.25) and end > self.end:
            sentences.append(
                f"{self.name} lasts {self.seconds:.4g} seconds by its header, but its pictures end after "
                f"{self.end:.4g}: these were used."
            )
        return tuple(sentences)


@dataclasses.dataclass
class Reader:
    """The one way into files: their frames as they are displayed.

    Attributes:
      header: what is known before anything is decoded.
      moments: (start, end, frame) in seconds from the first frame; a frame is what `pixels` takes.
      report: filled while the moments are read.
      size: (height, width) as displayed, of the first frame, which all later ones get; None before it.
    """

    header: Header
    moments: Iterator[tuple[float, float, Any]]
    report: Report
    size: tuple[int, int] | None = None

    def evenly(self, fps: float, start: float, nearest: bool = True) -> Iterator[tuple[float, float, Any]]:
        """The moments at an even rate; see `timing.evenly`."""
        return evenly(self.watched(), fps, self.header.fps, start, nearest)

    def watched(self) -> Iterator[tuple[float, float, Any]]:
        """The moments, while it is noted how even they are and where they end."""
        before, end = None, 0.0
        for begin, end, frame in self.moments:
            if before is not None and not 0.5 < (begin - before) * self.header.fps < 1.5:
                self.report.uneven = True
            before = begin
            yield begin, end, frame
        self.report.end = end

    def pixels(self, frame: Any) -> np.ndarray:
        """uint8[Y,X,3], upright and opaque, at its stored size."""
        array = frame if isinstance(frame, np.ndarray) else pixels(frame, self.report.name, self.header.axes)
        self.report.sizes.add(array.shape[:2])
        if array.shape[-1] == 4 and array[..., 3].min() < 255:
            self.report.transparent = True
        return opaque(array)

    def displayed(self, frame: Any) -> np.ndarray:
        """uint8[Y,X,3] of the first one's size: upright, opaque, of square pixels."""
        array = self.pixels(frame)
        if self.size is None:
            self.size = displayed_size((array.shape[0], array.shape[1]), self.stretch)
        return array if array.shape[:2] == self.size else resample(array, *self.size)

    @property
    def stretch(self) -> float:
        """The width of a pixel over its height once the frame is upright."""
        return 1 / self.header.stretch if self.header.axes[0] else self.header.stretch


def open_reader(path: Path, start: float = 0.0, report: Report | None = None) -> Reader:
    """A reader of a file's frames from the one on show at `start` seconds on.

    Args:
      path: a video or a picture.
      start: seconds; a still picture has no time to start at.
      report: is filled while the frames are read.

    Raises:
      UserError: as `read_video`.
    """
    report, path = Report() if report is None else report, user_path(path)
    picture = read_picture(path)
    if picture is not None:
        size, moment = picture.pixels.shape[:2], (0.0, picture.seconds, picture.pixels)
        known = Header(1 / picture.seconds, picture.seconds, (size[0], size[1]), 1, still=True)
        moments: Iterator[tuple[float, float, Any]] = iter([moment])
    elif (times := moving_picture(path)) is not None:
        known = _moving_header(path, times)
        moments = moving_frames(path, times, start)
    else:
        known = header(path)
        moments = decoded(path, start, report.lost)
    report.name, report.fps, report.seconds = str(path), known.fps, known.seconds
    report.high_range, report.notes = known.high_range, picture.notes if picture else known.notes
    return Reader(known, moments, report)


def _moving_header(path: Path, times: Sequence[tuple[float, float]]) -> Header:
    _, _, first = next(moving_frames(path, times, 0.0))
    end = times[-1][1]
    fps = even_rate(np.array([begin for begin, _ in times]), end, len(times) / end)
    return Header(fps, end, (first.shape[0], first.shape[1]), len(times), notes=moving_notes(path))


def read_video(path: Path, start: float = 0.0, frames: int | None = None) -> Video:
    """Reads a video (mp4, webm, mov, gif, ...) or a picture (png, jpeg, ...; one frame, 1 fps).

    Frames come as they are displayed: turned and mirrored as the file says, of square pixels, in sRGB, what is
    transparent on white, with eight bits. Frames that come at uneven times are resampled to `probe`'s rate: each
    instant gets the frame that is then on show. Of a damaged file what is readable is kept; `reader.read_media`
    tells what was not.

    Args:
      path: the file.
      start: seconds from the file's first frame; the result begins with the frame on show there.
      frames: how many at most; None reads to the end.

    Raises:
      UserError: there is no such file, it is no video, none of it is readable, or it ends before `start`.
    """
    if frames is not None and frames < 1:
        raise UserError(f"{path} can't be read: at least one frame has to be asked for, not {frames}.")
    fps = probe(path).fps
    kept = [frame for _, frame in itertools.islice(stream_frames(path, start, fps), frames)]
    if not kept:
        raise UserError(f"{path} has no frame at {start:g} seconds: it ends before; start earlier.")
    return Video(np.stack(kept), fps)


def probe(path: Path) -> Header:
    """What a file's header tells; where it names no duration, what its packets tell. Nothing is decoded of videos.

    Raises:
      UserError: there is no such file, or it is no video.
    """
    return open_reader(path).header


def stream_frames(
    path: Path,
    start: float = 0.0,
    fps: float | None = None,
    report: Report | None = None,
    nearest: bool = True,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (seconds from the file's first frame, uint8[Y,X,3]) in constant memory.

    It begins with the frame on show at `start` (seconds), reached from the keyframe before it. Past the end
    nothing comes. Frames come as `read_video`'s, all of `probe`'s size.

    Args:
      path: the file.
      start: seconds.
      fps: resample to this even rate; None yields the file's own frames at the times that it gives.
      report: takes what is met on the way: `report.damage()` after the last frame says what was lost.
      nearest: resampled frames last as long as the file's, to the nearest frame; else one comes for each instant at
        which there is one on show.

    Raises:
      UserError: as `read_video`.
    """
    reader = open_reader(path, start, report)
    moments = reader.watched() if fps is None or reader.header.still else reader.evenly(fps, start, nearest)
    shown, array = None, np.empty(0)
    for begin, _, frame in moments:
        if frame is not shown:
            shown, array = frame, reader.displayed(frame)
        yield begin, array


def resample(
    frame: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """One frame uint8[Y,X,3], or its part in `box` (left, top, right, bottom), at height x width pixels.

    Lanczos, whose window widens with the shrinking: every pixel of the source counts.
    """
    if height < 1 or width < 1:
        raise UserError(f"A frame can't be {height} pixels high and {width} wide: both are at least 1.")
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(image)


def resize(video: Video, height: int, width: int) -> Video:
    """The same video at height x width pixels; the aspect ratio may change."""
    return Video(np.stack([resample(frame, height, width) for frame in video.frames]), video.fps)


def letterbox(frames: np.ndarray) -> np.ndarray:
    """uint8[T,Y,X,3] scaled into the square of its short side, with black bars beside it."""
    height, width = frames.shape[1:3]
    side, longest = min(height, width), max(height, width)
    high, wide = (max(round(size * side / longest), 1) for size in (height, width))
    top, left = (side - high) // 2, (side - wide) // 2
    square = np.zeros((len(frames), side, side, 3), np.uint8)
    square[:, top : top + high, left : left + wide] = [resample(frame, high, wide) for frame in frames]
    return square


def frame_size(resolution: int, aspect: str | float) -> tuple[int, int]:
    """(height, width) whose short side is `resolution` and whose long side is even and nearest to `aspect`.

    Args:
      resolution: pixels of the short side.
      aspect: width over height: "16:9", "9:16", "1:1", 1.78.

    Raises:
      UserError: the aspect ratio or the resolution is not a positive number.
    """
    try:
        across, _, down = str(aspect).partition(":")
        ratio = float(across) / float(down or 1)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not (math.isfinite(ratio) and ratio > 0):
        raise UserError(f"The aspect ratio {aspect!r} is not width over height: write one like 16:9 or 1.78.")
    if resolution < 1:
        raise UserError(f"The resolution {resolution} is not a number of pixels: write one like 256.")
    # A tie goes to the larger number, so that the long side is never the shorter one.
    long = 2 * math.floor(resolution * max(ratio, 1 / ratio) / 2 + 0.5)
    return (resolution, long) if ratio >= 1 else (long, resolution)


def frame_count(duration: float, fps: float) -> int:
    """How many frames last `duration` seconds at `fps`: the nearest number, at least one."""
    return max(1, round(duration * fps))


def evenly_spread(total: int, count: int) -> np.ndarray:
    """Indices of `count` frames from the first to the last of `total`, evenly; all where there are fewer."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int)


def write_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: float,
    crf: int = 16,
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes an mp4 or a webm frame by frame, as `Video.save` does, holding a few at a time.

    Args:
      path: where to; its suffix is .mp4 or .webm.
      frames: uint8[Y,X,3] each, all of one size.
      fps: frames a second.
      crf, metadata: as `Video.save`'s.

    Raises:
      UserError: the suffix is another, there are no frames, or the place can't be written.
    """
    path, suffix = kind_of(path, STREAMED)
    with atomic_path(path) as temporary:
        write_container(temporary, frames, fps, suffix, crf, metadata)
    return path
