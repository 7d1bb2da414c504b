"""Text-to-video requests."""

from __future__ import annotations

import dataclasses

from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.pipeline import sketches
from sora_jax.pipeline.budget import frames_of
from sora_jax.pipeline.checks import check_text
from sora_jax.pipeline.job import Job, captions_of
from sora_jax.pipeline.keywords import accepts_aliases, check_conflicts
from sora_jax.pipeline.model import ONLY_PICTURES, VideoModel
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.shape import check_shape


@accepts_aliases
@dataclasses.dataclass(frozen=True)
class Request(Settings):
    """A text-to-video request.

    Attributes:
      prompt: what the video shows.
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
        """Raises UserError where it makes no sense for any model."""
        check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise UserError(
                "The prompt is empty: say what is to be seen, for example 'a red circle moves left'."
            )
        # None stands for the input's own elsewhere, and there is none here.
        for name in ("duration", "resolution", "aspect", "fps"):
            if getattr(self, name) is None:
                raise UserError(f"{name}=None can't be used: leave it out, or give a value.")
        # A default can't be distinguished from the same value passed; `generate` sees what was passed.
        shape = ("duration", "resolution", "aspect")
        named = {name: value for name in shape if (value := getattr(self, name)) != getattr(Request, name)}
        check_conflicts({"frames": self.frames, "size": self.size, **named})
        check_shape(self.duration, self.frames, self.fps, self.resolution, self.aspect, self.size)
        super().check()


def text_to_video(model: VideoModel, request: Request) -> Job:
    """The job of a request: everything is generated.

    Raises:
      UserError: the video is larger or longer than what can be made, or the model makes none of words.
    """
    if model.sampling.from_picture:
        raise UserError(ONLY_PICTURES)
    shape, settings = request.shape(), request.settings()
    model.check_limits(shape[0], shape[1:], request.fps, settings, held=False)
    return Job(sketches.all_noise(shape, request.fps), captions_of(request.prompt), settings)
