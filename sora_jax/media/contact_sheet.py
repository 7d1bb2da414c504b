"""A contact sheet of videos: a label above a strip of frames for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_jax.errors import UserError
from sora_jax.media.video import Video, evenly_spread, resize


def contact_sheet(
    videos: Sequence[Video],
    labels: Sequence[str],
    columns: int = 1,
    frames_per_video: int = 6,
    frame_height: int = 112,
    text_size: int = 14,
) -> Image.Image:
    """A sheet to look at: for each video its label above a strip of frames evenly spread in time.

    Args:
      videos: of any sizes; every frame is drawn `frame_height` pixels high, as wide as its aspect ratio says.
      labels: one a video; long ones are wrapped, to three lines at most.
      columns: strips side by side.
      frames_per_video: at most; a picture has one.
      frame_height: pixels.
      text_size: pixels.

    Raises:
      UserError: there are no videos, or not one label a video.
    """
    if not videos or len(videos) != len(labels):
        raise UserError(
            f"A sheet needs one label a video, but got {len(videos)} videos, {len(labels)} labels."
        )
    margin = 8
    strips = [_strip(video, frames_per_video, frame_height) for video in videos]
    columns = min(columns, len(videos))
    widths = [max(strip.width for strip in strips[column::columns]) for column in range(columns)]
    lefts = [margin + sum(widths[:column]) + column * 2 * margin for column in range(columns)]
    font = ImageFont.load_default(text_size)
    texts = [_wrapped(label, font, widths[i % columns]) for i, label in enumerate(labels)]
    line = math.ceil(text_size * 1.3)
    rows = range(0, len(videos), columns)
    text_heights = [line * max(text.count("\n") + 1 for text in texts[row : row + columns]) for row in rows]
    height = margin + sum(text_heights) + len(rows) * (frame_height + 2 * margin)
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + margin, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, text_height in zip(rows, text_heights):
        for i in range(row, min(row + columns, len(videos))):
            left = lefts[i - row]
            for number, words in enumerate(texts[i].split("\n")):
                draw.text((left, top + number * line), words, fill="black", font=font)
            sheet.paste(strips[i], (left, top + text_height))
        top += text_height + frame_height + 2 * margin
    return sheet


def _strip(video: Video, count: int, height: int) -> Image.Image:
    picked = Video(video.frames[evenly_spread(len(video), count)], video.fps)
    width = max(1, round(height * video.size[1] / video.size[0]))
    frames = resize(picked, height, width).frames
    gap = np.full((height, 2, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for f in frames for part in (f, gap)][:-1], axis=1))


def _wrapped(text: str, font: Any, width: int, lines: int = 3) -> str:
    """Breaks `text` between words to `width` pixels; what does not fit in `lines` becomes an ellipsis."""
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if out[-1] and font.getlength(longer) > width:
            out.append(word)
        else:
            out[-1] = longer
    if len(out) > lines:
        out = [*out[: lines - 1], " ".join(out[lines - 1 :])]
    for i, words in enumerate(out):
        if font.getlength(words) > width:
            while words and font.getlength(words + "...") > width:
                words = words[:-1]
            out[i] = words.rstrip() + "..."
    return "\n".join(out)
