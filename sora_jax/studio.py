"""The face: load a model and make videos with it.

>>> import sora_jax
>>> video = sora_jax.load("toyworld").generate("a red circle moves left", duration=2.0, aspect="16:9")
>>> video.save("out.mp4")
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing import PackedBatch, Placement, Run, coordinates, pack_rows, unpack, unpatchify
from sora_jax.diffusion import flow
from sora_jax.diffusion.sampler import SOLVERS, sample
from sora_jax.errors import UserError
from sora_jax.models.bundle import Bundle, bundled, find, load_bundle
from sora_jax.models.dit import DiT
from sora_jax.models.text import TextEncoder, load_text_encoder
from sora_jax.models.vae import VAE
from sora_jax.video import Video, frame_count, frame_size

MOST_STEPS = 1000
MOST_RUNS = 16  # a row
MOST_ROWS = 4  # a call of the compiled step


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompt: what is to be seen.
      duration: seconds; frames are round(duration × fps), at least one.
      resolution: the short side in pixels; the long side follows from `aspect` to the nearest even number.
      aspect: width to height, "16:9" or a number.
      fps: frames a second.
      seed: another one, another video.
      steps: of the solver.
      guidance: weight of classifier-free guidance; 1 is none.
      solver: "euler" or "heun".
      frames, size: the exact number of frames and (height, width), instead of duration, resolution and aspect.
    """

    prompt: str
    duration: float = 2.0
    resolution: int = 64
    aspect: str | float = "1:1"
    fps: float = 8.0
    seed: int = 0
    steps: int = 30
    guidance: float = 3.0
    solver: str = "euler"
    frames: int | None = None
    size: tuple[int, int] | None = None

    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the video."""
        frames = frame_count(self.duration, self.fps) if self.frames is None else self.frames
        return (frames, *(frame_size(self.resolution, self.aspect) if self.size is None else self.size))


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A model that can be loaded."""

    name: str
    kind: str  # "bundled", "directory" or "run"
    path: pathlib.Path
    summary: str


class Studio:
    """A loaded model. One instance serves any number of requests, of any shapes."""

    def __init__(self, bundle: Bundle, text: TextEncoder | None = None) -> None:
        self.bundle = bundle
        self._text = text

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def vae(self) -> VAE:
        return self.bundle.vae

    @property
    def card(self) -> dict[str, Any]:
        return self.bundle.card

    @property
    def dit(self) -> DiT:
        """The transformer.

        Raises:
          UserError: the model is an autoencoder only.
        """
        if self.bundle.dit is None:
            raise UserError(
                f"The model {self.name!r} is an autoencoder only: it can reconstruct, but not generate."
            )
        return self.bundle.dit

    @property
    def text(self) -> TextEncoder:
        """The text encoder, loaded when first needed."""
        if self._text is None:
            self._text = load_text_encoder(self.bundle.text)
        return self._text

    def generate(
        self, prompt: str, progress: Callable[[int, int], None] | None = None, **fields: Any
    ) -> Video:
        """A video of `prompt`; `fields` are those of `Request`.

        Raises:
          UserError: the prompt is empty or too long, or the model can't hold the shape.
        """
        return self.generate_batch([Request(prompt, **fields)], progress)[0]

    def generate_batch(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Video]:
        """Videos of several requests, whose shapes may all differ, packed into rows together.

        Each result is what its request gives alone, up to rounding.

        Args:
          progress: called with (steps done, steps in all).

        Raises:
          UserError: as `generate`; or the requests differ in solver, which is one for a batch.
        """
        if not requests:
            return []
        for request in requests:
            self.check(request)
        if len({request.solver for request in requests}) > 1:
            raise UserError("Requests in one batch share their solver: generate them apart, or choose one.")
        grids = [self.grid(request) for request in requests]
        states = self.text.encode([request.prompt for request in requests])
        runs = [
            self._run(request, grid, words)
            for request, grid, words in zip(requests, grids, states, strict=True)
        ]
        limits, patch = self.bundle.limits, self.dit.config.patch
        pack = functools.partial(pack_rows, runs, limits.tokens, limits.row_text, MOST_RUNS)
        needed = len(pack()[0].segment_ids)
        rows = min(needed, MOST_ROWS)
        batch, places = pack(rows=math.ceil(needed / rows) * rows)
        noise, sigmas, guidance = _plan(requests, places, batch, self.bundle.base_tokens)

        # Every call has the same shapes, whatever the requests': one compilation.
        parts = [slice(first, first + rows) for first in range(0, len(batch.segment_ids), rows)]
        filled = []
        for done, part in enumerate(parts):
            report = None
            if progress is not None:
                report = functools.partial(
                    lambda done, step, of: progress(done * of + step, len(parts) * of), done
                )
            few = jax.tree.map(lambda leaf, part=part: leaf[part], batch)
            solver = requests[0].solver
            filled.append(sample(self.dit, few, noise[part], sigmas[:, part], guidance[part], solver, report))
        return [
            self._decode(unpatchify(patches, grid, patch), request)
            for patches, grid, request in zip(
                unpack(np.concatenate(filled), places), grids, requests, strict=True
            )
        ]

    def reconstruct(self, video: Video) -> Video:
        """The video through the autoencoder and back; any size and number of frames."""
        frames, height, width = video.frames.shape[:3]
        shape = self._padded((frames, height, width), (1, 1, 1))
        sides = [
            (full - have, (full - have) // 2) for full, have in zip(shape[1:], (height, width), strict=True)
        ]
        padding = [(0, shape[0] - frames), *((before, both - before) for both, before in sides), (0, 0)]
        clip = np.pad(video.frames, padding, mode="edge")
        latent = _encode(self.vae, clip[None])[0]
        return Video(_to_pixels(_decode(self.vae, latent[None])[0], video.frames.shape), video.fps)

    def grid(self, request: Request) -> tuple[int, int, int]:
        """The latent (frames, height, width) that holds a request; it is cropped to the exact shape when decoded."""
        time, *space = self.vae.config.compression
        frames, *sides = self._padded(request.shape(), self.dit.config.patch)
        height, width = (side // factor for side, factor in zip(sides, space, strict=True))
        return 1 + (frames - 1) // time, height, width

    def tokens(self, request: Request) -> int:
        """Video tokens that a request takes."""
        return math.prod(
            side // by for side, by in zip(self.grid(request), self.dit.config.patch, strict=True)
        )

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
        if not 1 <= request.steps <= MOST_STEPS:
            raise UserError(f"steps={request.steps} can't be walked: give a number from 1 to {MOST_STEPS}.")
        if not math.isfinite(request.guidance):
            raise UserError(f"guidance={request.guidance} is no weight: give a number, for example 3.")
        if request.solver not in SOLVERS:
            raise UserError(f"There is no solver {request.solver!r}: choose one of {', '.join(SOLVERS)}.")
        if (words := self.text.count_tokens(request.prompt)) > self.bundle.limits.text:
            raise UserError(
                f"The prompt has {words} tokens and the model {self.name!r} reads {self.bundle.limits.text}: "
                "shorten it."
            )
        if (tokens := self.tokens(request)) > self.bundle.limits.tokens:
            raise UserError(self._too_large(request, tokens))

    def _too_large(self, request: Request, tokens: int) -> str:
        frames, height, width = request.shape()
        ways = []
        time = self.vae.config.compression[0]
        for fewer in range(frames - 1, 0, -1):
            if (fewer - 1) % time == 0 and self._fits(dataclasses.replace(request, frames=fewer)):
                ways.append(f"a duration of {fewer / request.fps:.3g} s at this size")
                break
        if request.size is None:
            for smaller in range(request.resolution - 1, 0, -1):
                if self._fits(dataclasses.replace(request, resolution=smaller)):
                    ways.append(f"a resolution of {smaller} for this long")
                    break
        return (
            f"{frames} frames of {width}×{height} take {tokens} tokens, and the model {self.name!r} holds "
            f"{self.bundle.limits.tokens}: the nearest that fits is {' or '.join(ways) or 'a smaller video'}."
        )

    def _fits(self, request: Request) -> bool:
        return self.tokens(request) <= self.bundle.limits.tokens

    def _padded(self, shape: tuple[int, int, int], patch: Sequence[int]) -> tuple[int, int, int]:
        """The nearest frames, height and width on the model's grid that hold `shape`."""
        time, *space = self.vae.config.compression
        latent_frames = 1 + math.ceil((shape[0] - 1) / time)
        frames = 1 + (math.ceil(latent_frames / patch[0]) * patch[0] - 1) * time
        units = [factor * by for factor, by in zip(space, patch[1:], strict=True)]
        height, width = (math.ceil(side / unit) * unit for side, unit in zip(shape[1:], units, strict=True))
        return frames, height, width

    def _run(self, request: Request, grid: tuple[int, int, int], words: np.ndarray) -> Run:
        config = self.dit.config
        n = self.tokens(request)
        return Run(
            patches=np.zeros((n, config.patch_width), np.float32),
            coords=coordinates(
                grid, config.patch, request.fps, self.vae.config.compression[0], config.coords
            ),
            given=np.zeros(n, bool),
            text=words,
            text_time=np.zeros(len(words), np.float32),
            key=request.prompt,
        )

    def _decode(self, latent: np.ndarray, request: Request) -> Video:
        clip = _decode(self.vae, latent[None])[0]
        return Video(_to_pixels(clip, request.shape()), request.fps)


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


def _plan(
    requests: Sequence[Request], places: Sequence[Placement], batch: PackedBatch, base_tokens: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise [B,N,P], levels [steps+1,B,S] and guidance [B,S]; each run has its own, wherever it lies."""
    rows, slots, width = batch.patches.shape
    steps = max(request.steps for request in requests)
    noise = np.zeros((rows, slots, width), np.float32)
    sigmas = np.zeros((steps + 1, rows, MOST_RUNS + 1), np.float32)
    guidance = np.ones((rows, MOST_RUNS + 1), np.float32)
    for request, place in zip(requests, places, strict=True):
        draw = np.random.default_rng(request.seed).standard_normal((place.length, width))
        noise[place.row, place.start : place.start + place.length] = draw
        factor = flow.shift_factor(jnp.array(place.length), base_tokens)
        sigmas[: request.steps + 1, place.row, place.segment] = flow.schedule(request.steps, factor)
        guidance[place.row, place.segment] = request.guidance
    return noise, sigmas, guidance


@jax.jit
def _encode(vae: VAE, clip: jax.Array) -> jax.Array:
    return vae.to_latent(clip.astype(jnp.float32) / 127.5 - 1.0)


@jax.jit
def _decode(vae: VAE, latent: jax.Array) -> jax.Array:
    return vae.from_latent(latent)


def _to_pixels(clip: jax.Array, shape: Sequence[int]) -> np.ndarray:
    """The first frames and the middle of each, as bytes."""
    T, Y, X = shape[:3]
    top, left = (clip.shape[1] - Y) // 2, (clip.shape[2] - X) // 2
    return np.asarray(jnp.round((clip[:T, top : top + Y, left : left + X] + 1.0) * 127.5)).astype(np.uint8)
