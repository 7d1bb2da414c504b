"""The public API: load a model and make videos with it.

>>> import sora_jax
>>> pipeline = sora_jax.load("toyworld")
>>> video = pipeline.generate("a red circle moves left", duration=2.0, aspect="16:9")
>>> pipeline.extend(video, seconds=2.0).save("out.mp4")
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from sora_jax.checkpoints.bundle import bundled, find
from sora_jax.checkpoints.components import Bundle, Sampling
from sora_jax.checkpoints.diffusers_folder import INDEX, Reference, is_pretrained
from sora_jax.checkpoints.finetuned import load_model, read_sampling
from sora_jax.checkpoints.hub import resolve
from sora_jax.checkpoints.pretrained import pretrained_summary
from sora_jax.checkpoints.taehv_weights import with_decoder
from sora_jax.errors import UserError
from sora_jax.media.video import Video, VideoStream
from sora_jax.models.text import TextEncoder
from sora_jax.pipeline import sketches, spatial_abilities, storyboard, temporal_abilities
from sora_jax.pipeline.checks import MAX_SEED, check_int
from sora_jax.pipeline.denoise import denoise, iter_latents
from sora_jax.pipeline.job import Job, metadata_of
from sora_jax.pipeline.keywords import explicit_keywords, suggestion
from sora_jax.pipeline.registry import ABILITIES, Ability
from sora_jax.pipeline.request import Request, text_to_video
from sora_jax.pipeline.review import review, review_batch
from sora_jax.pipeline.settings import Progress
from sora_jax.pipeline.vae_processor import VaeProcessor, to_bytes
from sora_jax.tokens.canvas import Canvas

MAX_COUNT = 1000  # videos of one request
# The functions that build jobs, by ability.
BUILDERS: dict[str, Callable[..., Job]] = {
    name: next(
        vars(module)[name]
        for module in (temporal_abilities, spatial_abilities, storyboard)
        if name in vars(module)
    )
    for name in ABILITIES
}


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded."""

    name: str
    kind: str  # "bundled", "directory", "run" or "diffusers"
    path: pathlib.Path
    summary: str


def _print_note(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


class Pipeline(VaeProcessor):
    """A model. One instance serves any number of requests, of any shapes.

    Every ability takes its inputs as files, `Video`s, pictures or arrays. All take the fields of `settings.Settings` as
    keywords, those with an input also the fields of `shape.Shape`; and `progress`, which is called with (steps done,
    steps in all).

    Args:
      bundle, text_encoder, sampling: as `model.VideoModel` takes them.
      notify: called with a sentence where a result differs from what was asked for, or is beyond what the model saw
        in training.
    """

    def __init__(
        self,
        bundle: Bundle | Callable[[], Bundle],
        text_encoder: TextEncoder | None = None,
        notify: Callable[[str], None] = _print_note,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(bundle, text_encoder, sampling)
        self.notify = notify

    def make(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[Video]:
        """Videos of several jobs, of any abilities and shapes, packed together.

        Raises:
          UserError: a prompt is too long, a frame more than the model holds, or the videos have more frames together
            than the largest `max_frames` among them.
        """
        return [stream.whole() for stream in self.make_streams(jobs, progress)]

    def make_streams(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[VideoStream]:
        """As `make`, but a video's frames come one by one, as soon as nothing changes them any more.

        They are made while they are read; videos are to be read one after another. Of text to video, the memory doesn't
        grow with the duration.
        """
        canvases = self._begin(jobs)
        latents = iter_latents(self, jobs, canvases, progress)
        return [self._decoded(*one) for one in zip(jobs, canvases, latents, strict=True)]

    def sample_latents(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[np.ndarray]:
        """The denoised latents of several jobs, float32[c,t,y,x] each, as the transformer gives them.

        Raises:
          UserError: as `make`.
        """
        canvases = denoise(self, jobs, self._begin(jobs), progress)
        return [np.moveaxis(canvas.latent, -1, 0) for canvas in canvases]

    def decode_job(self, job: Job, latents: np.ndarray) -> VideoStream:
        """The video of a job whose latents, float32[c,t,y,x], are there.

        Raises:
          UserError: they are of another shape than the job's.
        """
        canvas = self.prepare_latents(job.sketch)
        moved = np.moveaxis(np.asarray(latents, np.float32), 0, -1)
        if moved.shape != canvas.latent.shape:
            raise UserError(
                f"The latents are {moved.shape} and the video's are {canvas.latent.shape} (t, y, x, c)."
            )
        return self._decoded(job, canvas, iter(moved))

    def _begin(self, jobs: Sequence[Job]) -> list[Canvas]:
        """Reviews jobs, which notes or refuses, and encodes their conditioning."""
        for note in review_batch(self, jobs):
            self.notify(note)
        return [self.prepare_latents(job.sketch) for job in jobs]

    def _decoded(self, job: Job, canvas: Canvas, latents: Iterator[np.ndarray]) -> VideoStream:
        T, Y, X = job.sketch.frames.shape[:3]
        decoded = self.decode_frames(canvas, T, Y, X, ~canvas.conditioning_frames, latents)
        kept = range(T)[job.keep]
        frames = itertools.islice(_finished(job, decoded), kept.start, kept.stop)
        return VideoStream(frames, len(kept), (Y, X), job.sketch.fps, metadata_of(self.name, job))

    @overload
    def generate(
        self, prompt: str, progress: Progress | None = None, *, noise: np.ndarray | None = None, **fields: Any
    ) -> Video: ...

    @overload
    def generate(
        self, prompt: Sequence[str], progress: Progress | None = None, **fields: Any
    ) -> list[Video]: ...

    @explicit_keywords(Request)
    def generate(
        self,
        prompt: str | Sequence[str],
        progress: Progress | None = None,
        *,
        noise: np.ndarray | None = None,
        **fields: Any,
    ) -> Video | list[Video]:
        """A video of `prompt`; of several prompts a list, packed together.

        Args:
          noise: float32[c,t,y,x] in place of what the seed draws, for one prompt: to compare with another
            implementation.

        Raises:
          UserError: a prompt is empty or too long, the model can't hold the shape, or the noise is of another one.
        """
        if noise is not None:
            return self.make([self.request_job(prompt, noise, **fields)], progress)[0]
        several = isinstance(prompt, list | tuple)
        prompts: list[Any] = list(prompt) if several else [prompt]
        videos = self.generate_batch(
            [Request(each, **self.request_defaults(fields)) for each in prompts], progress
        )
        return videos if several else videos[0]

    def request_job(self, prompt: Any, noise: np.ndarray | None = None, **fields: Any) -> Job:
        """The job of one request, from a noise float32[c,t,y,x] where one is given.

        Raises:
          UserError: as `generate`.
        """
        job = text_to_video(self, Request(prompt, **self.request_defaults(fields)))
        if noise is None:
            return job
        if np.ndim(noise) != 4:
            raise UserError(
                f"The noise has {np.ndim(noise)} axes: give float32[channels, time, height, width]."
            )
        return dataclasses.replace(job, noise=np.moveaxis(np.asarray(noise, np.float32), 0, -1))

    def generate_batch(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Video]:
        """Videos of several requests, whose shapes may all differ, packed together.

        Each result is what its request gives alone, up to rounding.

        Raises:
          UserError: as `generate`; or the requests differ in solver or step_cache, which are one for a batch.
        """
        return self.make([text_to_video(self, request) for request in requests], progress)

    @explicit_keywords(Request)
    def stream(self, prompt: str, progress: Progress | None = None, **fields: Any) -> VideoStream:
        """As `generate`, for a video of any duration: its frames come while it is made, in constant memory.

        >>> pipeline.stream("a red circle moves left", duration=60.0).save("long.mp4")
        """
        return self.stream_batch([Request(prompt, **self.request_defaults(fields))], progress)[0]

    def stream_batch(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[VideoStream]:
        """As `generate_batch`, for videos that are read one after another; see `make_streams`."""
        return self.make_streams([text_to_video(self, request) for request in requests], progress)

    def request_defaults(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request, with the model's own where nothing is asked for."""
        shape = dict(self.shape_defaults)
        if fields.get("size") is not None:
            shape = {name: value for name, value in shape.items() if name not in ("resolution", "aspect")}
        if fields.get("frames") is not None:
            shape.pop("duration", None)
        return self.settings_defaults(fields) | shape | dict(fields)

    def job(self, ability: str, *arguments: Any, progress: Progress | None = None, **keywords: Any) -> Job:
        """The job of an ability, by its name in `registry.ABILITIES`: `make` takes several, of any abilities.

        Raises:
          UserError: there is no such ability; or as the function that builds it.
        """
        if ability not in ABILITIES:
            hint = suggestion(ability, ABILITIES) or f"choose from {', '.join(ABILITIES)}."
            raise UserError(f"There is no ability {ability!r}: {hint}")
        build = BUILDERS[ability]
        takes = inspect.signature(build).parameters
        if "progress" in takes:
            keywords["progress"] = progress
        # Abilities that make a video of words alone have a request's defaults; others keep the shape they are given.
        from_words = {name for name in self.shape_defaults if name in takes and takes[name].default}
        shape = {name: value for name, value in self.request_defaults(keywords).items() if name in from_words}
        return build(self, *arguments, **self.settings_defaults(keywords) | shape | keywords)

    @explicit_keywords(Request)
    def variations(
        self, prompt: str, count: int = 4, progress: Progress | None = None, *, seed: int = 0, **fields: Any
    ) -> list[Video]:
        """The same request under `count` seeds, from `seed` on."""
        check_int("count", count, 1, MAX_COUNT)
        check_int("seed", seed, 0, MAX_SEED)
        fields = self.request_defaults(fields)
        requests = [Request(prompt, seed=seed + number, **fields) for number in range(count)]
        return self.generate_batch(requests, progress)

    def reconstruct(self, video: Video) -> Video:
        """The video through the autoencoder and back; any size and number of frames."""
        frames = video.frames
        sketch = sketches.Sketch(frames, np.zeros(frames.shape[:3], np.float32), video.fps)
        return Video(self.decode_latents(self.prepare_latents(sketch), *frames.shape[:3]), video.fps)

    if TYPE_CHECKING:  # the abilities' methods are made of the registry

        def __getattr__(self, name: str) -> Callable[..., Video]: ...

    def check(self, request: Request) -> None:
        """Whether the model can do it.

        Raises:
          UserError: what it can't do, and the nearest that it does well.
        """
        review(self, text_to_video(self, request))


def _method(ability: Ability) -> Callable[..., Video]:
    """The method of `Pipeline` that makes an ability's video, with its function's keywords and docstring."""
    build = BUILDERS[ability.name]
    takes = inspect.signature(build)
    own = [parameter for name, parameter in takes.parameters.items() if name not in ("model", "progress")]
    positional = [parameter for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = inspect.Parameter("self", kind)
    last = inspect.Parameter("progress", kind, default=None, annotation=Progress | None)

    @functools.wraps(build)
    def make(self: Pipeline, *arguments: Any, progress: Progress | None = None, **keywords: Any) -> Video:
        if len(arguments) > len(positional):
            *arguments, progress = arguments  # type: ignore[assignment]
        return self.make([self.job(ability.name, *arguments, progress=progress, **keywords)], progress)[0]

    make.__signature__ = takes.replace(  # type: ignore[attr-defined]
        parameters=[first, *positional, last, *own[len(positional) :]], return_annotation=Video
    )
    make.__name__ = ability.method or ability.name
    make.__qualname__ = f"Pipeline.{make.__name__}"
    return make


for _ability in ABILITIES.values():
    setattr(Pipeline, _ability.method or _ability.name, _method(_ability))


def _finished(job: Job, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8[Y,X,3] each, of decoded frames float32[Y,X,3]."""
    if job.finish is not None:  # which looks at all of them
        frames = iter(job.finish(np.stack(list(frames))))
    yield from map(to_bytes, frames)


def load(
    name: str | os.PathLike[str] = "toyworld",
    *,
    lazy: bool = False,
    dtype: str = "",
    weights: str = "",
    offload: bool = False,
    reference: Reference = "diffusers",
    lora: str | os.PathLike[str] | Sequence[tuple[str, float]] = (),
    decoder: str | os.PathLike[str] = "",
) -> Pipeline:
    """Loads a bundled model by name, or a folder: of a model, a training run, or a diffusers pipeline.

    Args:
      name: of the model; "hf:OWNER/NAME" is one on the Hugging Face hub.
      lazy: look only whether it is there, and read its files when they are first needed.
      dtype: of the arithmetic, "float32", "bfloat16" or "float16"; "" is the model's own.
      weights: of a diffusers folder: type of the transformer's parameters in memory, such as "int8"; "" is `dtype`.
      offload: of a diffusers folder: the transformer's blocks come to the device one by one, where it is larger.
      reference: of a diffusers folder: "diffusers" or "original", whose arithmetic, schedule and defaults are followed.
      lora: of a diffusers folder: a LoRA file, or several with their scales, [("style.safetensors", 0.8), ...].
      decoder: a file of TAEHV's weights for this model's latents, whose decoder then makes the frames: a preview.

    Raises:
      UserError: there is no such model, or its files are damaged.
    """
    name = resolve(name)
    find(name)
    loras = [(str(lora), 1.0)] if isinstance(lora, (str, os.PathLike)) else list(lora)

    def read() -> Bundle:
        bundle = load_model(name, dtype, reference, loras, weights, offload)
        return with_decoder(bundle, decoder) if decoder else bundle

    return Pipeline(read if lazy else read(), sampling=read_sampling(name, reference))


def list_models(folders: Sequence[str | os.PathLike[str]] = ("runs",)) -> list[ModelEntry]:
    """What can be loaded: bundled models, and those in `folders` or one level below them."""
    entries = [ModelEntry(name, "bundled", find(name), _summary(find(name))) for name in bundled()]
    for folder in map(pathlib.Path, folders):
        files = [
            name
            for place in ("", "*/")
            for known in ("config.json", INDEX)
            for name in folder.glob(place + known)
        ]
        for config in sorted(files):
            kind = (
                "diffusers"
                if config.name == INDEX
                else "run"
                if (config.parent / "checkpoints").is_dir()
                else "directory"
            )
            entries.append(ModelEntry(str(config.parent), kind, config.parent, _summary(config.parent)))
    return entries


def _summary(folder: pathlib.Path) -> str:
    if is_pretrained(folder):
        try:
            return pretrained_summary(folder)
        except UserError as error:
            return str(error)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return "unreadable config.json"
    if "objective" in config:
        return f"training run of objective {config['objective']!r}"
    return config.get("card", {}).get("summary", "autoencoder" if "dit" not in config else "no summary")
