"""Frames as files: mp4, webm, gif, png and jpeg, and what they say of how they were made."""

from __future__ import annotations

import contextlib
import fractions
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import av
import numpy as np
from av.video import reformatter
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import ExifTags, Image, PngImagePlugin

from sora_jax.errors import UserError, user_path
from sora_jax.media.containers import EXACT, Path, open_container

# Browsers slow down a GIF whose frames last less than two hundredths of a second.
GIF_MAX_FPS = 50.0

# What is written frame by frame, and what is written at once.
STREAMED = (".mp4", ".webm")
KINDS = (*STREAMED, ".gif", ".png", ".jpg", ".jpeg")

# EXIF says in eight bytes how a comment is written.
_ASCII = b"ASCII\0\0\0"
# EXIF is one segment of a JPEG, whose length has 16 bits.
_MOST_EXIF = 60_000


def kind_of(path: Path, kinds: tuple[str, ...] = KINDS) -> tuple[pathlib.Path, str]:
    """The path, and the suffix that names what is written there, in small letters.

    Raises:
      UserError: it is none of `kinds`.
    """
    path = user_path(path)
    suffix = path.suffix.lower()
    if suffix not in kinds:
        how = "frame by frame only as" if kinds == STREAMED else "as"
        raise UserError(f"{path} can't be written: a video is saved {how} {', '.join(kinds)}; choose one.")
    return path, suffix


def write_container(
    file: Path | io.BytesIO,
    frames: Iterable[np.ndarray],
    fps: float,
    kind: str = ".mp4",
    crf: int = 16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an mp4 (H.264) or a webm (VP9), tagged BT.709, holding a few frames at a time.

    Args:
      file: a path, or a file in memory.
      frames: uint8[Y,X,3] each, all of one size.
      fps: frames a second.
      kind: ".mp4" or ".webm".
      crf: x264's constant rate factor, 0 (lossless) to 51; VP9 gets its own equivalent.
      metadata: see `read_metadata`.

    Raises:
      UserError: there are no frames.
    """
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise UserError("There is no frame to write: a video has at least one.")
    height, width = first.shape[:2]
    even = height % 2 == 0 and width % 2 == 0
    # faststart reads the file again to move its index to the front, which only a path allows.
    options = {"movflags": "faststart"} if kind == ".mp4" and not isinstance(file, io.BytesIO) else {}
    if kind == ".mp4":
        codec, pix_fmt, settings = "libx264", "yuv420p" if even else "yuv444p", {"preset": "medium"}
    else:
        # Quality alone decides, no bit rate; VP9's 4:2:0 has odd sides too.
        codec, pix_fmt = "libvpx-vp9", "yuv420p"
        settings = {"deadline": "good", "cpu-used": "4", "row-mt": "1", "b": "0"}
        settings |= {"lossless": "1"} if crf == 0 else {}
        crf = round(crf * 63 / 51)
    how: dict[str, Any] = {"mode": "w", "format": kind[1:], "options": options}
    with av.open(file, **how) if isinstance(file, io.BytesIO) else open_container(file, **how) as container:
        if metadata:
            container.metadata["comment"] = _as_json(metadata)
        stream = container.add_stream(codec, _fraction(fps), {"crf": str(crf), **settings})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        context = stream.codec_context
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        # WebM says so in its header; H.264 is so unless it says else.
        if hasattr(context, "chroma_sample_location"):
            context.chroma_sample_location = reformatter.ChromaLocation.LEFT
        for index, array in enumerate(itertools.chain([first], rest)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24")
            # H.264's chroma samples are at the left of their pixels; set too late, colours shift by half a pixel.
            if hasattr(frame, "chroma_location"):  # PyAV 19; Python 3.11 gets an older one
                frame.chroma_location = reformatter.ChromaLocation.LEFT
            frame = frame.reformat(
                format=stream.pix_fmt,
                interpolation=EXACT,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = index, 1 / _fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_gif(
    file: Path | io.BytesIO, frames: np.ndarray, fps: float, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes uint8[T,Y,X,3] as a GIF that loops for ever, at most `GIF_MAX_FPS` frames a second."""
    total, seconds = len(frames), len(frames) / fps
    rate = min(fps, GIF_MAX_FPS)
    count = max(1, round(seconds * rate))
    picked = np.minimum(((np.arange(count) + 0.5) * fps / rate).astype(int), total - 1)
    images = [Image.fromarray(frame) for frame in frames[picked]]
    # A GIF counts hundredths of a second: rounding the ends, not the lengths, keeps the whole in time.
    ends = np.round(np.arange(count + 1) * 100 / rate).astype(int)
    durations = [int(10 * length) for length in np.diff(ends)]
    comment = {"comment": _as_json(metadata, ascii=True).encode()} if metadata else {}
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, **comment
    )


def write_picture(
    file: Path | io.BytesIO, picture: np.ndarray, kind: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes uint8[Y,X,3] as ".png" or ".jpg".

    Raises:
      UserError: the metadata is too long for a JPEG.
    """
    image, text = Image.fromarray(picture), _as_json(metadata, ascii=True) if metadata else ""
    if kind == ".png":
        chunks = PngImagePlugin.PngInfo()
        if text:
            chunks.add_text("Comment", text)
        image.save(file, "PNG", pnginfo=chunks)
        return
    exif = Image.Exif()
    if len(text) > _MOST_EXIF:
        raise UserError(
            f"The metadata has {len(text)} letters, and a JPEG holds {_MOST_EXIF}: save a PNG instead."
        )
    if text:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + text.encode()
    image.save(file, "JPEG", quality=95, subsampling=0, exif=exif)


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of how it was made: the `metadata` with which it was saved; empty where it has none.

    It stands as one JSON object in the file's comment: mp4's and WebM's tag, GIF's extension, PNG's "Comment",
    EXIF's "UserComment".

    Raises:
      UserError: there is no such file, or it is neither a picture nor a video.
    """
    path = user_path(path)
    if not os.path.isfile(path):
        raise UserError(f"There is no file {path}: check the name.")
    for comment in (_picture_comment, _container_comment):
        text = comment(path)
        if text is not None:
            with contextlib.suppress(ValueError):
                found = json.loads(text)
                return (
                    {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
                )
            return {}
    raise UserError(f"{path} is neither a picture nor a video that can be read: name a file of either kind.")


def comment_of(container: Any) -> str:
    """The comment in a container of PyAV's, however it spells the key."""
    return next((text for key, text in container.metadata.items() if key.lower() == "comment"), "")


def _picture_comment(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            if isinstance(comment, bytes):
                return comment.removeprefix(_ASCII).decode("utf-8", "replace")
            # A PNG's text may stand behind its pixels.
            image.load()
            text = image.info.get("comment", image.info.get("Comment", ""))
            return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    except Exception:  # no picture, or one that Pillow can't read: FFmpeg may
        return None


def _container_comment(path: Path) -> str | None:
    try:
        with open_container(path) as container:
            return comment_of(container)
    except (av.FFmpegError, OSError):
        return None


def _as_json(metadata: Mapping[str, str], ascii: bool = False) -> str:
    return json.dumps({str(key): str(value) for key, value in metadata.items()}, ensure_ascii=ascii)


def _fraction(fps: float) -> fractions.Fraction:
    """The rate as containers write it: 24000/1001 comes back exact from its float."""
    return max(fractions.Fraction(fps).limit_denominator(1001), fractions.Fraction(1, 1001))
