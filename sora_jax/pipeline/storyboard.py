"""Storyboards: cards with a time, a text and perhaps a picture or a clip; read from YAML.

duration: 4            # seconds; all but cards may be left out
fps: 8
resolution: 64
aspect: 16:9
loop: 1.5              # seconds that lead back to the beginning; left out, it doesn't loop
cards:
  - at: 0
    text: a red circle moves right
    image: circle.png  # what is seen at that time; or clip: circle.mp4, of which start: 1 and end: 2.5 take a part
  - at: 2
    text: a blue square moves left
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from sora_jax.errors import UserError, user_path
from sora_jax.media.containers import Path
from sora_jax.media.reader import MediaLike
from sora_jax.media.texts import read_text
from sora_jax.media.video import frame_size
from sora_jax.pipeline import sketches
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import check_number, is_number, short_repr
from sora_jax.pipeline.inputs import AS_IT_IS, Part, read_input
from sora_jax.pipeline.job import Job, ability, parse_options
from sora_jax.pipeline.keywords import suggestion
from sora_jax.pipeline.model import VideoModel
from sora_jax.pipeline.shape import Shape, check_shape
from sora_jax.tokens.canvas import Sketch


@dataclasses.dataclass(frozen=True)
class Card:
    """From `at` seconds on its text is the active caption; at that time its picture is shown, or its clip begins.

    `start` and `end`, in seconds, say which part of the clip, or which frame of a video is the picture.
    """

    at: float = 0.0
    text: str = ""
    image: MediaLike | None = None
    clip: MediaLike | None = None
    start: float = 0.0
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Storyboard:
    """See the module's docstring.

    Raises:
      UserError: there is no card, their times don't rise, or are outside of the video.
    """

    cards: tuple[Card, ...]
    duration: float = 2.0
    fps: float = 8.0
    resolution: int = 64
    aspect: str | float = "1:1"
    loop: float = 0.0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.cards:
            raise UserError("The storyboard has no cards: give at least one, with a time and a text.")
        try:
            check_shape(self.duration, None, self.fps, self.resolution, self.aspect, self.size)
            check_number("loop", self.loop, minimum=0)
        except UserError as error:
            raise UserError(f"The storyboard's {error}") from None
        for number, card in enumerate(self.cards, 1):
            where = f"Card {number} of the storyboard"
            for name, value in (("at", card.at), ("start", card.start)):
                if not is_number(value):
                    raise UserError(f"{where} has {name}={short_repr(value)}: give seconds.")
            if not isinstance(card.text, str):
                raise UserError(f"{where} has text={short_repr(card.text)}: give a text.")
            if not 0 <= card.at < self.duration:
                raise UserError(f"{where} is at {card.at:g} s, outside of the video's {self.duration:g} s.")
            if not card.text.strip() and card.image is None and card.clip is None:
                raise UserError(f"{where} has neither text nor picture: give it one.")
            if card.image is not None and card.clip is not None:
                raise UserError(f"{where} has a picture and a clip: give one of the two.")
        for number, (card, after) in enumerate(zip(self.cards, self.cards[1:]), 1):
            if round(after.at * self.fps) <= round(card.at * self.fps):
                raise UserError(
                    f"Cards {number} and {number + 1} of the storyboard are at {card.at:g} and {after.at:g} s: put "
                    f"them in the order of their times, a frame (1/{self.fps:g} s) or more apart."
                )


def read_storyboard(path: Path) -> Storyboard:
    """Reads a YAML file; its pictures' and clips' paths are relative to it.

    Raises:
      UserError: the file is missing or no storyboard.
    """
    path = user_path(path)
    text = read_text(path)
    try:
        parts = yaml.load(text, _Loader)
    except UserError as error:
        raise UserError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = f"line {mark.line + 1}" if mark else "it holds characters that YAML doesn't allow"
        raise UserError(f"{path} is no YAML ({what}): see docs/abilities.md for a storyboard.") from error
    if not isinstance(parts, dict) or not isinstance(parts.get("cards"), list):
        raise UserError(f"{path} is no storyboard: it needs a list of cards, see docs/abilities.md.")
    fields = _known(path, "the storyboard", parts, Storyboard)
    cards = []
    for number, entry in enumerate(parts["cards"], 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: card {number} is no card: it needs at least a time and a text.")
        own = _known(path, f"card {number}", entry, Card)
        cards.append(
            Card(
                **own
                | {name: path.parent / user_path(own[name]) for name in ("image", "clip") if name in own}
            )
        )
    try:
        return Storyboard(**fields | {"cards": tuple(cards)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class _Loader(yaml.BaseLoader):
    """Reads all as text: YAML would read 16:9 as 969, and no as false. Refuses duplicate keys; YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number]:
                line = key.start_mark.line + 1
                raise UserError(
                    f"line {line}: {short_repr(key.value)} is a duplicate key: keep one of the two."
                )
        return super().construct_mapping(node, deep)


def _known(path: pathlib.Path, what: str, parts: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """The fields of a card or a storyboard, numbers parsed."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(schema) if field.name != "size"}
    values: dict[str, Any] = {}
    for name, value in parts.items():
        if name not in fields:
            hint = suggestion(name, fields) or f"it may have {', '.join(fields)}."
            raise UserError(f"{path}: {what} has no {short_repr(name)}: {hint}")
        if value == "":  # a key without a value
            continue
        kind: Any = {"float": float, "float | None": float, "int": int}.get(fields[name])
        try:
            values[name] = kind(value) if kind else value
        except (TypeError, ValueError):
            raise UserError(f"{path}: {what}'s {name} is {value!r}: give a number.") from None
        if not kind and name != "cards" and not isinstance(value, str):
            raise UserError(f"{path}: {what}'s {name} is {value!r}: give a text.")
    return values


@ability
def storyboard(model: VideoModel, board: Storyboard | Path, **options: Any) -> Job:
    """The video that a storyboard, or its YAML file, describes; see `storyboard.Storyboard`.

    What is named of its shape replaces the storyboard's own.

    Raises:
      UserError: a picture or clip can't be read, or a clip lasts beyond the next card.
    """
    board = board if isinstance(board, Storyboard) else read_storyboard(board)
    shape, settings = parse_options(options)
    if shape != AS_IT_IS:
        fps = shape.fps or board.fps
        board = dataclasses.replace(
            board,
            duration=shape.num_frames(fps) / fps if shape.frames else shape.duration or board.duration,
            fps=fps,
            resolution=shape.resolution or board.resolution,
            aspect=board.aspect if shape.aspect is None else shape.aspect,
            size=shape.size or (None if shape.has_size else board.size),
        )
    size = frame_size(board.resolution, board.aspect) if board.size is None else board.size
    T = frames_of(board.duration, board.fps)
    new = frames_of(board.loop, board.fps) if board.loop else 0
    given = any(card.image is not None or card.clip is not None for card in board.cards)
    model.check_limits(T + new, size, board.fps, settings, held=given)
    sketch = sketches.all_noise((T, *size), board.fps, writable=given)
    notes: list[str] = []
    ends = [*(card.at for card in board.cards[1:]), board.duration]
    for number, (card, end) in enumerate(zip(board.cards, ends, strict=True), 1):
        source = card.image if card.clip is None else card.clip
        if source is None:
            continue
        seconds = 1e-6 if card.clip is None else None
        part = Part(source, card.start, card.end)
        media = read_input(model, part, Shape(fps=board.fps, size=size), seconds)
        notes += media.notes
        first = min(round(card.at * board.fps), T - 1)
        last = first + len(media.video)
        if last > round(end * board.fps):
            raise UserError(
                f"The clip of card {number} lasts {media.video.duration:g} s from {card.at:g} s on, beyond "
                f"{end:g} s, where {'the next card begins' if number < len(board.cards) else 'the video ends'}: "
                "give the card an end for its clip."
            )
        sketch.frames[first:last] = media.video.frames
        sketch.strength[first:last] = 0
    keep = slice(None)
    if board.loop:
        sketch, keep = _with_loop(sketch, new)
    captions = tuple((card.at, card.text) for card in board.cards if card.text.strip())
    return Job(sketch, captions, settings, keep, notes=tuple(notes))


def _with_loop(sketch: Sketch, new: int) -> tuple[Sketch, slice]:
    """The sketch and `new` frames that lead back to its first one, which must be conditioning."""
    if not sketch.conditioning_frames[0]:
        raise UserError(
            "A storyboard that loops begins with a picture to come back to: give its first card, at 0 s, an image."
        )
    T = len(sketch.frames)
    frames = np.concatenate([sketch.frames, np.repeat(sketch.frames[:1], new + 1, axis=0)])
    strength = np.concatenate([sketch.strength, np.ones((new + 1, *sketch.strength.shape[1:]), np.float32)])
    strength[-1] = 0
    return Sketch(frames, strength, sketch.fps), slice(T + new)
