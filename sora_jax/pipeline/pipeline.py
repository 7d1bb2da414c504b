"""The face: load a model and make videos with it.

>>> import sora_jax
>>> studio = sora_jax.load("toyworld")
>>> video = studio.generate("a red circle moves left", duration=2.0, aspect="16:9")
>>> studio.extend(video, seconds=2.0).save("out.mp4")
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from sora_jax.checkpoints.bundle import Bundle, bundled, find, load_bundle
from sora_jax.errors import UserError
from sora_jax.media.containers import Path
from sora_jax.media.video import Video, VideoStream, frame_size
from sora_jax.models.text import TextEncoder
from sora_jax.pipeline import abilities, tasks
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import MOST_SEED, check_number, check_text, check_whole
from sora_jax.pipeline.codec import Codec, to_bytes
from sora_jax.pipeline.denoise import iter_latents
from sora_jax.pipeline.inputs import MediaInput
from sora_jax.pipeline.job import Job, captions_of, metadata_of, parse_options
from sora_jax.pipeline.keywords import called, check_conflicts, spelled_out, spelled_right
from sora_jax.pipeline.review import review, review_batch
from sora_jax.pipeline.settings import Progress, Settings
from sora_jax.pipeline.shape import SHAPE_FIELDS, Shape, check_shape
from sora_jax.pipeline.storyboard import Storyboard, read_storyboard

MOST_COUNT = 1000  # videos of one request


@spelled_right
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

    And what `settings.Settings` has: seed, steps, guidance, solver, ...
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
        frames = frames_of(self.duration, self.fps) if self.frames is None else self.frames
        return (frames, *(frame_size(self.resolution, self.aspect) if self.size is None else self.size))

    def settings(self) -> Settings:
        """Its part that says how it is sampled."""
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})

    def check(self) -> None:
        """Raises UserError where it makes no sense, whatever the model."""
        check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise UserError(
                "The prompt is empty: say what is to be seen, for example 'a red circle moves left'."
            )
        # None stands for the input's own elsewhere, and there is none here.
        for name in ("duration", "resolution", "aspect", "fps"):
            if getattr(self, name) is None:
                raise UserError(f"{name}=None can't be used: leave it out, or give a value.")
        # A default isn't told from the same value said; `generate` and its like see what was said.
        said = ("duration", "resolution", "aspect")
        named = {name: value for name in said if (value := getattr(self, name)) != getattr(Request, name)}
        check_conflicts({"frames": self.frames, "size": self.size, **named})
        check_shape(self.duration, self.frames, self.fps, self.resolution, self.aspect, self.size)
        super().check()


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded."""

    name: str
    kind: str  # "bundled", "directory" or "run"
    path: pathlib.Path
    summary: str


def _aloud(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def _ability(plan: Callable[..., Job], name: str = "") -> Callable[..., Video]:
    """The method of `Pipeline` that makes what a function of `plans` plans, with its keywords and docstring."""
    takes = inspect.signature(plan)
    _, *rest = takes.parameters.values()
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    progress = inspect.Parameter(
        "progress", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Progress | None
    )

    @functools.wraps(plan)
    def make(self: Pipeline, *arguments: Any, progress: Progress | None = None, **keywords: Any) -> Video:
        return self.make([plan(self, *arguments, **keywords)], progress)[0]

    make.__signature__ = takes.replace(  # type: ignore[attr-defined]
        parameters=[first, *rest, progress], return_annotation=Video
    )
    make.__name__ = name or plan.__name__
    make.__qualname__ = f"Pipeline.{make.__name__}"
    return make


class Pipeline(Codec):
    """A model. One instance serves any number of requests, of any shapes.

    Every ability takes what it is given as a file, a `Video`, a picture or an array. All take the fields of
    `settings.Settings` as keywords, those that are given a video or picture also the fields of `shape.Shape`; and
    `progress`, which is called with (steps done, steps in all).

    Args:
      bundle: as `model.Model` takes it.
      say: called with a sentence where something is made otherwise than it was asked for, or is beyond what the
        model saw in training.
    """

    def __init__(
        self,
        bundle: Bundle | Callable[[], Bundle],
        text: TextEncoder | None = None,
        say: Callable[[str], None] = _aloud,
    ) -> None:
        super().__init__(bundle, text)
        self.say = say

    def make(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[Video]:
        """Videos of several jobs, of any abilities and shapes, packed together.

        Raises:
          UserError: a prompt is too long, a frame more than the model holds, or the videos have more frames together
            than the largest `max_frames` among them.
        """
        return [stream.whole() for stream in self.make_streams(jobs, progress)]

    def make_streams(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[VideoStream]:
        """As `make`, but a video's frames come one by one, as soon as nothing changes them any more.

        They are made while they are read; videos are to be read one after another. Where nothing is given but words,
        what is held of a video doesn't grow with its duration.
        """
        for note in review_batch(self, jobs):
            self.say(note)
        canvases = [self.encode(job.sketch) for job in jobs]
        streams = []
        for job, canvas, latents in zip(
            jobs, canvases, iter_latents(self, jobs, canvases, progress), strict=True
        ):
            T, Y, X = job.sketch.frames.shape[:3]
            decoded = self.decode_frames(canvas, T, Y, X, ~canvas.fixed, latents)
            kept = range(T)[job.keep]
            frames = itertools.islice(_finished(job, decoded), kept.start, kept.stop)
            made = metadata_of(self.name, job)
            streams.append(VideoStream(frames, len(kept), (Y, X), job.sketch.fps, made))
        return streams

    @overload
    def generate(self, prompt: str, progress: Progress | None = None, **fields: Any) -> Video: ...

    @overload
    def generate(
        self, prompt: Sequence[str], progress: Progress | None = None, **fields: Any
    ) -> list[Video]: ...

    @spelled_out(Request)
    def generate(
        self, prompt: str | Sequence[str], progress: Progress | None = None, **fields: Any
    ) -> Video | list[Video]:
        """A video of `prompt`; of several prompts a list, packed into rows together.

        Raises:
          UserError: a prompt is empty or too long, or the model can't hold the shape.
        """
        several = isinstance(prompt, list | tuple)
        prompts: list[Any] = list(prompt) if several else [prompt]
        videos = self.generate_batch([Request(each, **fields) for each in prompts], progress)
        return videos if several else videos[0]

    def generate_batch(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Video]:
        """Videos of several requests, whose shapes may all differ, packed into rows together.

        Each result is what its request gives alone, up to rounding.

        Raises:
          UserError: as `generate`; or the requests differ in solver, which is one for a batch.
        """
        return self.make([self.job(request) for request in requests], progress)

    @spelled_out(Request)
    def stream(self, prompt: str, progress: Progress | None = None, **fields: Any) -> VideoStream:
        """As `generate`, for a video of any duration: its frames come while it is made, in constant memory.

        >>> studio.stream("a red circle moves left", duration=60.0).save("long.mp4")
        """
        return self.stream_batch([Request(prompt, **fields)], progress)[0]

    def stream_batch(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[VideoStream]:
        """As `generate_batch`, for videos that are read one after another; see `make_streams`."""
        return self.make_streams([self.job(request) for request in requests], progress)

    def job(self, request: Request) -> Job:
        """Text to video: nothing is given.

        Raises:
          UserError: the video is larger or longer than what can be made.
        """
        shape, settings = request.shape(), request.settings()
        self.admit(shape[0], shape[1:], request.fps, settings, held=False)
        return Job(abilities.blank(shape, request.fps), captions_of(request.prompt), settings)

    @spelled_out(Request, leave_out=("duration", "fps", "frames"))
    def image(self, prompt: str, progress: Progress | None = None, **fields: Any) -> Video:
        """A picture of `prompt`: a clip of one frame."""
        return self.generate(prompt, progress, frames=1, **fields)

    @spelled_out(Request)
    def variations(
        self, prompt: str, count: int = 4, progress: Progress | None = None, *, seed: int = 0, **fields: Any
    ) -> list[Video]:
        """The same request under `count` seeds, from `seed` on."""
        check_whole("count", count, 1, MOST_COUNT)
        check_whole("seed", seed, 0, MOST_SEED)
        requests = [Request(prompt, seed=seed + number, **fields) for number in range(count)]
        return self.generate_batch(requests, progress)

    animate = _ability(tasks.animate)
    extend = _ability(tasks.extend)
    recut = _ability(tasks.recut)
    fill_frames = _ability(tasks.fill, "fill_frames")
    smooth = _ability(tasks.smooth)
    connect = _ability(tasks.connect)
    blend = _ability(tasks.blend)
    inpaint = _ability(tasks.inpaint)
    outpaint = _ability(tasks.outpaint)
    edit = _ability(tasks.edit)
    upscale = _ability(tasks.upscale)

    @spelled_out(Shape, Settings)
    def loop(
        self,
        video: MediaInput | None = None,
        prompt: str = "",
        seconds: float | None = None,
        progress: Progress | None = None,
        *,
        strength: float = 1.0,
        **options: Any,
    ) -> Video:
        """An endless loop of a video, or of a prompt alone: made first, then led back to its beginning.

        See `tasks.loop`. Of a prompt alone, the video lasts 1.5 seconds before it goes back, or as long as
        `duration` leaves for it.
        """
        job = self.loop_job(video, prompt, seconds, progress, strength=strength, **options)
        return self.make([job], progress)[0]

    def loop_job(
        self,
        video: MediaInput | None,
        prompt: str = "",
        seconds: float | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Job:
        """See `loop`: of a prompt alone, its video is made here."""
        if video is not None:
            return tasks.loop(self, video, seconds, prompt, **options)
        if not (isinstance(prompt, str) and prompt.strip()):
            raise UserError(f"There is nothing to loop: name a video, or give a {called('prompt')}.")
        strength = options.pop("strength", 1.0)
        shape, settings = parse_options(options)
        way = 1.5 if seconds is None else seconds
        check_number("seconds", way, above=0)
        fps = shape.fps or Request.fps
        fields = {
            name: value
            for name in ("resolution", "aspect", "size")
            if (value := getattr(shape, name)) is not None
        }
        first = shape.count(fps) / fps - way if shape.long else 1.5
        if first <= 0:
            raise UserError(
                f"The way back takes {way:g} s, which leaves no video: ask for a longer duration."
            )
        made = self.generate(
            prompt, progress, duration=first, fps=fps, **fields, **dataclasses.asdict(settings)
        )
        kept = {name: value for name, value in options.items() if name not in SHAPE_FIELDS}
        return tasks.loop(self, made, way, prompt, strength=strength, **kept)

    @spelled_out(Shape, Settings)
    def storyboard(self, board: Storyboard | Path, progress: Progress | None = None, **options: Any) -> Video:
        """The video that a storyboard, or its YAML file, tells; see `storyboard.Storyboard`.

        What is named of its shape stands in place of the storyboard's own.
        """
        board = board if isinstance(board, Storyboard) else read_storyboard(board)
        return self.make([board.job(self, **options)], progress)[0]

    def reconstruct(self, video: Video) -> Video:
        """The video through the autoencoder and back; any size and number of frames."""
        frames = video.frames
        sketch = abilities.Sketch(frames, np.zeros(frames.shape[:3], np.float32), video.fps)
        return Video(self.decode(self.encode(sketch), *frames.shape[:3]), video.fps)

    def check(self, request: Request) -> None:
        """Whether the model can do it.

        Raises:
          UserError: what it can't do, and the nearest that it does well.
        """
        review(self, self.job(request))


def _finished(job: Job, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8[Y,X,3] each, of decoded frames float32[Y,X,3]."""
    if job.finish is not None:  # which looks at all of them
        frames = iter(job.finish(np.stack(list(frames))))
    yield from map(to_bytes, frames)


def load(name: str | os.PathLike[str] = "toyworld", *, lazy: bool = False) -> Pipeline:
    """Loads a bundled model by name, a folder that holds one, or a training run's workdir.

    Args:
      name: of the model.
      lazy: look only whether it is there, and read its files when they are first needed.

    Raises:
      UserError: there is no such model, or its files are damaged.
    """
    find(name)
    return Pipeline(functools.partial(load_bundle, name) if lazy else load_bundle(name))


def list_models(folders: Sequence[str | os.PathLike[str]] = ("runs",)) -> list[ModelEntry]:
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
