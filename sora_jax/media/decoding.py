"""Video files through FFmpeg: what their headers tell, and their frames as they are displayed, at their times."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.format import Flags
from av.sidedata.sidedata import Type
from av.stream import Disposition

from sora_jax.errors import UserError
from sora_jax.media.colours import colour_remark, is_high_range
from sora_jax.media.containers import EXACT, Path, open_container
from sora_jax.media.timing import SHORTEST, even_rate, first_instant, snap

# Their usual decoders know nothing of transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Colour matrices that no part of FFmpeg at hand converts, by their number in ITU-T H.273.
RARE_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived with constant luminance",
    14: "ICtCp",
    15: "IPT-PQ-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
UNTAGGED = 2
# Codecs whose frames may have a colour profile.
PROFILED = ("png", "apng", "mjpeg", "webp", "webp_anim", "tiff", "libjxl", "libjxl_anim")
FLOATS = re.compile(r"f(16|32)([lb]e)?$")
# Files of so many lines or columns that don't name their matrix are shown as BT.709, smaller ones as BT.601: browsers'
# and mpv's rule, which holds for films cut to a wide format too.
HIGH_DEFINITION = 720
WIDE = 1280

# Frames a second; slow motion of cameras and screens is below it.
FASTEST = 960

# Of a slow file whose header lists no times, so many packets are looked at for how even they are.
MAX_SCANNED = 10_000


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known of a file before its pictures are decoded.

    Attributes:
      fps: the even rate at which what is in the file is seen: its average, or more where its times are uneven
        (`timing.even_rate`); 1 for a picture.
      seconds: for which its pictures are on show.
      size: (height, width) in pixels as displayed: upright, of square pixels.
      frames: how many there are; None where the header doesn't tell.
      stretch: the width of a stored pixel over its height, before the frame is turned.
      high_range: whether its colours are HDR (PQ or HLG).
      still: whether it is a picture, of no duration of its own (a still GIF may have one).
      grace: seconds by which a frame may begin later than asked for and is on show then all the same.
      axes: (transposed, mirrored left to right, turned upside down): what is done in this order to display a frame.
      notes: how it looks otherwise here, a sentence each, without the file's name at the beginning.
    """

    fps: float
    seconds: float
    size: tuple[int, int]
    frames: int | None
    stretch: float = 1.0
    high_range: bool = False
    still: bool = False
    grace: float = 1e-6
    axes: tuple[bool, bool, bool] = (False, False, False)
    notes: tuple[str, ...] = ()


def why_unreadable(path: Path, otherwise: str | None) -> str:
    """What a look at the bytes of a file tells of why FFmpeg can't read it, with what to do."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        if not head.strip(b"\0"):
            return "it begins with zeros alone, as unfinished downloads do; fetch it again"
        if head.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS; run git lfs pull"
        if head[:256].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
            return "it is a text, such as the page of a failed download; fetch it again"
        if head[4:8] == b"ftyp":  # mp4 and mov are boxes, each a length and a name
            place = 0
            boxes: list[bytes] = []
            while place + 8 <= size and len(boxes) < 1000:
                file.seek(place)
                length, name = struct.unpack(">I4s", file.read(8))
                if length == 1:
                    (length,) = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))
                boxes.append(name)
                place = size if length == 0 else place + max(length, 8)
            if b"moov" not in boxes:
                return "it is cut off before its index, which such a file has at its end; copy or record it again"
            if place > size:
                return "its end is missing; copy or fetch it again"
    return f"it is damaged, cut off or of another kind ({otherwise})"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's (container, stream of pictures) of a video file.

    Raises:
      UserError: it is no video.
    """
    try:
        container = open_container(path)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} can't be read as a video: {why_unreadable(path, error.strerror)}."
        ) from error
    with container:
        if container.format.name == "tty":  # FFmpeg films the scrolling text of any .txt
            raise UserError(f"{path} is a text, not a video: name a video or a picture.")
        films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        brand, others = (container.metadata.get(key, "") for key in ("major_brand", "compatible_brands"))
        if brand in ("hevc", "msf1", "avis"):
            # A sequence of pictures, before which stands one of them as a still.
            films.sort(key=lambda stream: stream.frames <= 1)
        elif brand in ("heic", "heix") or (brand == "mif1" and "hei" in others):
            # FFmpeg gives one tile of many.
            raise UserError(f"{path} is a HEIC picture, which can't be read here: save it as JPEG or PNG.")
        if films and films[0].codec_context is None:  # FFmpeg has no such codec
            raise UserError(f"{path} is coded in a way that is not known here: save it as H.264 in an mp4.")
        if not films:
            raise UserError(f"{path} has no pictures in it, only sound or data: choose a video file.")
        films[0].thread_type = "AUTO"
        yield container, films[0]


def is_raw(container: Any) -> bool:
    """Whether a file is a stream in no container: frames without times, which can't be searched for a time."""
    return Flags.no_timestamps in Flags(container.format.flags)


def header(path: Path) -> Header:
    """What a video's header tells; where it doesn't, what its packets tell, without decoding them.

    Raises:
      UserError: it is no video.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    return _header(os.fspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _header(path: str, *content: int) -> Header:
    with opened(path) as (container, stream):
        context = stream.codec_context
        seconds = _seconds_of(container, stream)
        fps = _average_of(stream)
        ratio = float(stream.sample_aspect_ratio or 1)
        stretch = ratio if 0.1 < ratio < 10 else 1.0  # anything else is damage
        size = displayed_size((context.height, context.width), stretch)
        axes = _axes(_matrix_of(path, stream))
        size = size[::-1] if axes[0] else size
        primaries, transfer = int(context.color_primaries), int(context.color_trc)
        high_range = is_high_range(transfer)
        notes = tuple(filter(None, [colour_remark(primaries, transfer)]))
        frames = stream.frames or None
        # GIF only estimates its average rate.
        estimated = context.name == "gif" or not _is_rate(stream.average_rate)
        if math.isnan(seconds) or estimated or fps * SHORTEST < 1:
            times, end, whole = _times(container, stream, fps, math.isnan(seconds))
            if estimated and len(times) and end > times[0]:
                fps = len(times) / (end - float(times[0]))
            if whole and len(times):
                if math.isnan(seconds) or context.name == "gif":
                    seconds = end - float(times[0])
                frames = frames or len(times)
            fps = even_rate(times, end, fps)
        return Header(
            fps, seconds, size, frames, stretch, high_range, grace=_grace(stream), axes=axes, notes=notes
        )


def _average_of(stream: Any) -> float:
    """Frames a second on the average, as the header tells."""
    rates = (stream.average_rate, stream.guessed_rate)
    return float(next(filter(_is_rate, rates), 25))


def _is_rate(rate: Any) -> bool:
    """FFmpeg gives the ticks of the clock where it doesn't know."""
    return bool(rate) and rate <= FASTEST


def _grace(stream: Any) -> float:
    """Containers round times, and what is asked for may be the exact time of a frame."""
    return min(float(stream.time_base), 0.25 / _average_of(stream))


def _seconds_of(container: Any, stream: Any) -> float:
    """The duration of the pictures as the header tells, NaN where it doesn't."""
    if is_raw(container):  # FFmpeg divides its size by a rate of bits
        return math.nan
    if stream.duration:
        return float(stream.duration * stream.time_base)
    with contextlib.suppress(KeyError, ValueError):  # Matroska: "00:01:02.500000000"
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    return container.duration / av.time_base if container.duration else math.nan


def _times(container: Any, stream: Any, fps: float, to_the_end: bool) -> tuple[np.ndarray, float, bool]:
    """Seconds at which the packets' frames begin, ascending; the end of the last; and whether these are all."""
    tick = float(stream.time_base)
    index = getattr(stream, "index_entries", ())
    if not to_the_end and stream.frames > 1 and len(index) == stream.frames:
        # Times of decoding, which differ from those of showing by a constant in all but the first few.
        begins = [entry.timestamp * tick for entry in index]
        times = np.sort(np.array(begins))
        return times, float(times[-1]) + 1 / fps, False
    most = None if to_the_end else MAX_SCANNED
    spans, before, raw = [], 0.0, is_raw(container)
    for packet in itertools.islice(packets(container, stream), most):
        if packet.size:
            begin = before if packet.pts is None or raw else packet.pts * tick
            before = begin + (packet.duration * tick if packet.duration else 1 / fps)
            spans.append((begin, before))
    spans.sort()
    end = max((end for _, end in spans), default=0.0)
    return np.array([begin for begin, _ in spans]), end, most is None or len(spans) < most


def _matrix_of(path: str, stream: Any) -> np.ndarray | None:
    """A stream's display matrix, i32[9].

    The frames have it too, but listing their side data has crashed PyAV 19.
    """
    if hasattr(stream.codec_context, "coded_side_data"):
        data = stream.codec_context.coded_side_data.get("display_matrix")
        return None if data is None else np.frombuffer(data, np.int32)
    if stream.codec_context.name in PROFILED:
        return None
    # An older PyAV doesn't tell, but the first frame does.
    with opened(path) as (container, again):
        first = next(_readable(container, again, []), None)
        return None if first is None else _frame_matrix(first)


def _axes(matrix: np.ndarray | None) -> tuple[bool, bool, bool]:
    """(transposed, mirrored left to right, turned upside down): what a display matrix does, in this order.

    A point (x, y) of the stored frame is shown at (a x + c y, b x + d y), ISO/IEC 14496-12 8.3.2. What is neither
    a quarter turn nor a mirror is taken as the nearest that is.
    """
    if matrix is None:
        return False, False, False
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def displayed_size(size: tuple[int, int], stretch: float) -> tuple[int, int]:
    """(height, width) with square pixels. The side that is too short grows, so nothing is lost."""
    return round(size[0] / min(stretch, 1)), round(size[1] * max(stretch, 1))


def pixels(frame: Any, name: str, axes: tuple[bool, bool, bool]) -> np.ndarray:
    """A decoded frame as uint8[Y,X,3], or uint8[Y,X,4] where something may be transparent; turned for display.

    Its pixels are as wide and high as they are stored: see `Header.stretch`.

    Args:
      frame: PyAV's.
      name: what messages call the file.
      axes: as `Header.axes`.

    Raises:
      UserError: its colours can't be converted.
    """
    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    if FLOATS.search(frame.format.name):
        raise UserError(
            f"{name} has floating-point pixels ({frame.format.name}), whose scale isn't known here: save it with 8 or "
            f"16 bits a channel."
        )
    untagged = frame.colorspace == UNTAGGED and (frame.height >= HIGH_DEFINITION or frame.width >= WIDE)
    try:
        array = frame.to_ndarray(
            format="rgba" if alpha else "rgb24",
            interpolation=EXACT,
            src_colorspace="ITU709" if untagged else None,
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        matrix = RARE_MATRICES.get(frame.colorspace)
        raise UserError(
            f"{name} has colours of a kind that can't be converted to RGB here "
            f"({f'the matrix is {matrix}' if matrix else frame.format.name}): convert it to BT.709 first."
        ) from error
    transposed, mirrored, flipped = axes
    if transposed:
        array = array.swapaxes(0, 1)
    if mirrored:
        array = array[:, ::-1]
    if flipped:
        array = array[::-1]
    return np.ascontiguousarray(array)


def _frame_matrix(frame: Any) -> np.ndarray | None:
    # An older PyAV stumbles over kinds that it doesn't know, such as EXIF's.
    with contextlib.suppress(ValueError):
        data = frame.side_data.get(Type.DISPLAYMATRIX)
        return None if data is None else np.frombuffer(bytes(data), np.int32)
    return None


def decoded(path: Path, start: float, lost: list[float] | None = None) -> Iterator[tuple[float, float, Any]]:
    """Yields (start, end, frame) in seconds from the first frame, from the frame on show at `start` on.

    Args:
      path: a video.
      start: seconds.
      lost: takes the seconds of each frame that could not be decoded whole.
    """
    lost = [] if lost is None else lost
    # Some containers jump too far, to a keyframe after the place: then from further back, then from the start.
    for origin in (start, start - 5, 0.0):
        lost.clear()
        with opened(path) as (container, stream):
            tick = float(stream.time_base)
            offset = (stream.start_time or 0) * tick
            length, grace = 1 / _average_of(stream), _grace(stream)
            raw = is_raw(container)
            if origin > 0 and not raw:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int((origin + offset) / tick), stream=stream)
            end, shown = 0.0, None
            for frame in _readable(container, stream, lost):
                begin = end if frame.pts is None or raw else frame.pts * tick - offset
                end = begin + (frame.duration * tick or length)
                if begin <= start + grace:
                    shown = begin, end, frame
                elif shown is None and origin > 0:
                    break
                else:
                    if shown is not None:
                        yield shown
                    shown = begin, end, frame
            else:
                if shown is not None or origin <= 0:
                    break
    if shown is None:
        raise UserError(f"{path} has no readable frame: it is damaged, cut off or no video.")
    if end > start + grace:
        yield shown


def taken_from(path: Path, start: float) -> float:
    """The second of a file at which reading it from `start` begins: that of its frame on show there.

    Raises:
      UserError: it is no video.
    """
    if start <= 0:
        return 0.0
    fps = header(path).fps
    begin, _, _ = next(decoded(path, start), (start, start, None))
    return first_instant(snap(begin, fps), start, fps)


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """A stream's packets; a cut-off file ends where it is cut."""
    stream_packets = container.demux(stream)
    while True:
        try:
            yield next(stream_packets)
        except (StopIteration, av.FFmpegError):
            return


def _readable(container: Any, stream: Any, lost: list[float]) -> Iterator[Any]:
    """Decodes what can be decoded: bad packets are passed over."""
    context, tick = stream.codec_context, float(stream.time_base)
    if stream.metadata.get("alpha_mode") == "1" and context.name in ALPHA_DECODERS:
        context = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    for packet in packets(container, stream):
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            frames = []
            lost.append(((packet.pts or 0) - (stream.start_time or 0)) * tick)
        for frame in frames:
            if frame.is_corrupt:
                lost.append(((frame.pts or 0) - (stream.start_time or 0)) * tick)
            yield frame
