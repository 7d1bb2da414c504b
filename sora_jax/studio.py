"""The face: load a model and make videos with it.

>>> import sora_jax
>>> studio = sora_jax.load("toyworld")
>>> video = studio.generate("a red circle moves left", duration=2.0, aspect="16:9")
>>> studio.extend(video, seconds=2.0).save("out.mp4")
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sora_jax import plans
from sora_jax.containers import Path
from sora_jax.diffusion import abilities
from sora_jax.engine import Engine, to_bytes
from sora_jax.errors import UserError
from sora_jax.filling import Progress, Settings, Task
from sora_jax.inputs import Source
from sora_jax.models.bundle import Bundle, bundled, find, load_bundle
from sora_jax.models.text import TextEncoder
from sora_jax.plans import Plan
from sora_jax.storyboard import Storyboard, read_storyboard
from sora_jax.video import Video, VideoStream, frame_count, frame_size


@dataclasses.dataclass(frozen=True)
class Request(Settings):
    """What is asked for: a video of a prompt.

    Attributes:
      prompt: what is to be seen.
      duration: seconds; frames are round(duration × fps), at least one.
      resolution: the short side in pixels; the long side follows from `aspect` to the nearest even number.
      aspect: width to height, "16:9" or a number.
      fps: frames a second.
      frames, size: the exact number of frames and (height, width), instead of duration, resolution and aspect.

    And what `filling.Settings` has: seed, steps, guidance, solver, ...
    """

    prompt: str
    duration: float = 2.0
    resolution: int = 64
    aspect: str | float = "1:1"
    fps: float = 8.0
    frames: int | None = None
    size: tuple[int, int] | None = None

    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the video."""
        frames = frame_count(self.duration, self.fps) if self.frames is None else self.frames
        return (frames, *(frame_size(self.resolution, self.aspect) if self.size is None else self.size))

    def settings(self) -> Settings:
        """Its part that says how it is sampled."""
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded."""

    name: str
    kind: str  # "bundled", "directory" or "run"
    path: pathlib.Path
    summary: str


def _aloud(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


class Studio(Engine):
    """A loaded model. One instance serves any number of requests, of any shapes.

    Every ability takes what it is given as a file, a `Video`, a picture or an array, and the fields of
    `filling.Settings` as keywords; `progress` is called with (steps done, steps in all).

    Args:
      say: called with a sentence where something is made otherwise than it was asked for.
    """

    def __init__(
        self, bundle: Bundle, text: TextEncoder | None = None, say: Callable[[str], None] = _aloud
    ) -> None:
        super().__init__(bundle, text)
        self.say = say

    def make(self, plans: Sequence[Plan], progress: Progress | None = None) -> list[Video]:
        """Videos of several plans, whatever their abilities and shapes, packed into rows together.

        Raises:
          UserError: a prompt is too long, or a frame more than the model holds.
        """
        return [stream.whole() for stream in self.make_streams(plans, progress)]

    def make_streams(self, plans: Sequence[Plan], progress: Progress | None = None) -> list[VideoStream]:
        """As `make`, but a video's frames come one by one, as soon as nothing changes them any more.

        They are made while they are read; videos are to be read one after another. Where nothing is given but words,
        what is held of a video doesn't grow with its duration.
        """
        for plan in plans:
            self._check_plan(plan)
        for note in dict.fromkeys(note for plan in plans for note in plan.notes):
            self.say(note)
        tasks = [Task(self.encode(plan.sketch), plan.words, plan.settings) for plan in plans]
        streams = []
        for plan, task, latents in zip(plans, tasks, self.fill_streams(tasks, progress), strict=True):
            T, Y, X = plan.sketch.frames.shape[:3]
            painted = task.canvas.start.any((1, 2))
            decoded = self.decode_frames(task.canvas, T, Y, X, painted, latents)
            kept = range(T)[plan.keep]
            frames = itertools.islice(_finished(plan, decoded), kept.start, kept.stop)
            streams.append(VideoStream(frames, len(kept), (Y, X), plan.sketch.fps))
        return streams

    def generate(self, prompt: str, progress: Progress | None = None, **fields: Any) -> Video:
        """A video of `prompt`; `fields` are those of `Request`.

        Raises:
          UserError: the prompt is empty or too long, or the model can't hold the shape.
        """
        return self.generate_batch([Request(prompt, **fields)], progress)[0]

    def generate_batch(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Video]:
        """Videos of several requests, whose shapes may all differ, packed into rows together.

        Each result is what its request gives alone, up to rounding.

        Raises:
          UserError: as `generate`; or the requests differ in solver, which is one for a batch.
        """
        return self.make(self._plans(requests), progress)

    def stream(self, prompt: str, progress: Progress | None = None, **fields: Any) -> VideoStream:
        """As `generate`, for a video of any duration: its frames come while it is made, in constant memory.

        >>> studio.stream("a red circle moves left", duration=60.0).save("long.mp4")
        """
        return self.stream_batch([Request(prompt, **fields)], progress)[0]

    def stream_batch(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[VideoStream]:
        """As `generate_batch`, for videos that are read one after another; see `make_streams`."""
        return self.make_streams(self._plans(requests), progress)

    def _plans(self, requests: Sequence[Request]) -> list[Plan]:
        for request in requests:
            self.check(request)
        return [self.plan(request) for request in requests]

    def plan(self, request: Request) -> Plan:
        """Text to video: nothing is given."""
        return Plan(
            abilities.blank(request.shape(), request.fps), ((0.0, request.prompt),), request.settings()
        )

    def image(self, prompt: str, progress: Progress | None = None, **fields: Any) -> Video:
        """A picture of `prompt`: a clip of one frame. `fields` are those of `Request`."""
        return self.generate(prompt, progress, frames=1, **fields)

    def variations(
        self, prompt: str, count: int = 4, progress: Progress | None = None, **fields: Any
    ) -> list[Video]:
        """The same request under `count` seeds, from `seed` on."""
        if count < 1:
            raise UserError(f"{count} variations make nothing: ask for at least one.")
        first = fields.pop("seed", 0)
        return self.generate_batch(
            [Request(prompt, seed=first + i, **fields) for i in range(count)], progress
        )

    def animate(
        self, picture: Any, prompt: str = "", progress: Progress | None = None, **options: Any
    ) -> Video:
        """A video in which the picture is the first frame, or another one; see `plans.animate`."""
        return self.make([plans.animate(self, picture, prompt, **options)], progress)[0]

    def extend(
        self,
        video: Source,
        seconds: float,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video and what comes after it, or before; see `plans.extend`."""
        return self.make([plans.extend(self, video, seconds, prompt, **options)], progress)[0]

    def recut(
        self,
        video: Source,
        start: float,
        end: float,
        seconds: float,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """A part of the video, continued; see `plans.recut`."""
        return self.make([plans.recut(self, video, start, end, seconds, prompt, **options)], progress)[0]

    def loop(
        self,
        video: Source | None = None,
        prompt: str = "",
        seconds: float = 1.5,
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """An endless loop of a video, or of a prompt alone: made first, then led back to its beginning.

        `options` are those of `plans.loop`, and for a prompt alone those of `Request` too.
        """
        if video is None:
            own = {field.name for field in dataclasses.fields(Request)} - {"prompt"}
            fields = {name: value for name, value in options.items() if name in own}
            video = self.generate(prompt, progress, **{"duration": 1.5} | fields)
            kept = {field.name for field in dataclasses.fields(Settings)} | {"strength"}
            options = {name: value for name, value in options.items() if name in kept}
        return self.make([plans.loop(self, video, seconds, prompt, **options)], progress)[0]

    def fill_frames(
        self,
        video: Source,
        missing: Sequence[tuple[float, float]],
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video with frames painted that are missing; see `plans.fill`."""
        return self.make([plans.fill(self, video, missing, prompt, **options)], progress)[0]

    def smooth(
        self,
        video: Source,
        fps: float = 24.0,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video at a higher frame rate; see `plans.smooth`."""
        return self.make([plans.smooth(self, video, fps, prompt, **options)], progress)[0]

    def connect(
        self,
        a: Source,
        b: Source,
        seconds: float = 2.0,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """One video, a passage, and the other; see `plans.connect`."""
        return self.make([plans.connect(self, a, b, seconds, prompt, **options)], progress)[0]

    def blend(
        self,
        a: Source,
        b: Source,
        curve: Sequence[tuple[float, float]] | None = None,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """Both videos at once, by a weight over time; see `plans.blend`."""
        return self.make([plans.blend(self, a, b, curve, prompt, **options)], progress)[0]

    def inpaint(
        self, video: Source, prompt: str = "", progress: Progress | None = None, **options: Any
    ) -> Video:
        """The video with a box, or what a mask shows, painted anew; see `plans.inpaint`."""
        return self.make([plans.inpaint(self, video, prompt, **options)], progress)[0]

    def outpaint(
        self,
        video: Source,
        aspect: str | float,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video in a frame of another aspect ratio; see `plans.outpaint`."""
        return self.make([plans.outpaint(self, video, aspect, prompt, **options)], progress)[0]

    def edit(
        self,
        video: Source,
        prompt: str,
        strength: float = 0.7,
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video as another prompt has it; see `plans.edit`."""
        return self.make([plans.edit(self, video, prompt, strength, **options)], progress)[0]

    def upscale(
        self,
        video: Source,
        resolution: int,
        prompt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Video:
        """The video at a higher resolution; see `plans.upscale`."""
        return self.make([plans.upscale(self, video, resolution, prompt, **options)], progress)[0]

    def storyboard(
        self, board: Storyboard | Path, progress: Progress | None = None, **settings: Any
    ) -> Video:
        """The video that a storyboard, or its YAML file, tells; see `storyboard.Storyboard`."""
        board = board if isinstance(board, Storyboard) else read_storyboard(board)
        return self.make([board.plan(self, **settings)], progress)[0]

    def reconstruct(self, video: Video) -> Video:
        """The video through the autoencoder and back; any size and number of frames."""
        frames = video.frames
        sketch = abilities.Sketch(frames, np.zeros(frames.shape[:3], np.float32), video.fps)
        return Video(self.decode(self.encode(sketch), *frames.shape[:3]), video.fps)

    def check(self, request: Request) -> None:
        """Whether the model can do it.

        Raises:
          UserError: what it can't do, and the nearest that it can.
        """
        if not request.prompt.strip():
            raise UserError(
                "The prompt is empty: say what is to be seen, for example 'a red circle moves left'."
            )
        for name, value in (
            ("duration", request.duration),
            ("fps", request.fps),
            ("resolution", request.resolution),
        ):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}={value:g} makes no video: give a number above 0.")
        request.settings().check()
        self._check_words(((0.0, request.prompt),))
        frames, height, width = request.shape()
        if self._holds(height, width) < min(frames, 2):
            raise UserError(self._too_large(request))

    def _check_plan(self, plan: Plan) -> None:
        plan.settings.check()
        self._check_words(plan.words)
        _, height, width, _ = plan.sketch.frames.shape
        if self._holds(height, width) < min(len(plan.sketch.frames), 2) and plan.sketch.strength.max() == 1:
            raise UserError(self._too_large(Request("?", size=(height, width))))

    def _check_words(self, words: Sequence[tuple[float, str]]) -> None:
        limits, in_all = self.bundle.limits, 0
        for _, prompt in words:
            count = self.text.count_tokens(prompt)
            in_all += count
            if count > limits.text:
                raise UserError(
                    f"The prompt has {count} tokens and the model {self.name!r} reads {limits.text}: shorten it."
                )
        if in_all > limits.row_text:
            raise UserError(
                f"The cards have {in_all} tokens together and the model {self.name!r} reads {limits.row_text}: use "
                "fewer words."
            )

    def _holds(self, height: int, width: int) -> int:
        """Latent frames of a size that the model sees at once."""
        return self.window(self.frame_tokens(height, width))

    def _too_large(self, request: Request) -> str:
        _, height, width = request.shape()
        tokens = self.frame_tokens(height, width)
        short, nearest = min(height, width), 0
        for smaller in range(short - 1, 0, -1):
            if self._holds(*(max(round(side * smaller / short), 1) for side in (height, width))) >= 2:
                nearest = smaller
                break
        return (
            f"A frame of {width}×{height} takes {tokens} tokens, and the model {self.name!r} holds "
            f"{self.bundle.limits.tokens} in a run of two or more: the nearest that fits is a resolution of {nearest}."
        )


def _finished(plan: Plan, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8[Y,X,3] each, of decoded frames float32[Y,X,3]."""
    if plan.finish is not None:  # which looks at all of them
        frames = iter(plan.finish(np.stack(list(frames))))
    yield from map(to_bytes, frames)


def load(name: str | os.PathLike[str] = "toyworld") -> Studio:
    """Loads a bundled model by name, a folder that holds one, or a training run's workdir.

    Raises:
      UserError: there is no such model, or its files are damaged.
    """
    return Studio(load_bundle(name))


def models(folders: Sequence[str | os.PathLike[str]] = ("runs",)) -> list[ModelEntry]:
    """What can be loaded: bundled models, and those in `folders` or one level below them."""
    entries = [ModelEntry(name, "bundled", find(name), _summary(find(name))) for name in bundled()]
    for folder in map(pathlib.Path, folders):
        for config in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")]):
            kind = "run" if (config.parent / "checkpoints").is_dir() else "directory"
            entries.append(ModelEntry(str(config.parent), kind, config.parent, _summary(config.parent)))
    return entries


def _summary(folder: pathlib.Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return "unreadable config.json"
    if "objective" in config:
        return f"training run of objective {config['objective']!r}"
    return config.get("card", {}).get("summary", "autoencoder" if "dit" not in config else "no summary")
