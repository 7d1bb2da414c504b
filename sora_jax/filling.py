"""Filling canvases: windows in time and space, packed into rows together, walked by the one sampler.

A canvas may be longer than a row of tokens: it is filled in windows that overlap in time, and what has been filled
is given to the next. Every call of the sampler's compiled step has the same shapes, whatever the canvases'.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing import PackedBatch, Placement, pack_rows, unpack
from sora_jax.data.patches import patchify, unpatchify
from sora_jax.diffusion import flow
from sora_jax.diffusion.canvas import Canvas, blend_windows, space_windows, to_run, windows
from sora_jax.diffusion.guidance import METHODS, Guidance, tabulate
from sora_jax.diffusion.sampler import SOLVERS, sample
from sora_jax.errors import UserError
from sora_jax.models.bundle import Bundle
from sora_jax.models.dit import DiT
from sora_jax.models.text import TextEncoder

MOST_STEPS = 1000
MOST_RUNS = 16  # a row
MOST_ROWS = 4  # a call of the compiled step
MOST_CONDITIONS = 32  # a row: levels and words in force, over its runs

Progress = Callable[[int, int], None]
Words = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How something is sampled.

    Attributes:
      seed: another one, another video.
      steps: of the solver.
      guidance: weight of the words; 1 is none.
      solver: a name of `sampler.SOLVERS`.
      guidance_method: a name of `guidance.METHODS`.
      guidance_interval: (lowest, highest) σ between which guidance acts.
      guidance_rescale: 0 to 1, how far what guidance adds in contrast is taken back.
      given_guidance: weight of what is given (pictures, clips) apart from the words; 1 is none.
      negative: words for what is not to be seen.
    """

    seed: int = 0
    steps: int = 12
    guidance: float = 3.0
    solver: str = "euler"
    guidance_method: str = "cfg"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    given_guidance: float = 1.0
    negative: str = ""

    @property
    def weights(self) -> Guidance:
        """How strongly it is led."""
        low, high = self.guidance_interval
        method = METHODS.index(self.guidance_method)
        return Guidance(self.guidance, self.given_guidance, low, high, self.guidance_rescale, method)

    def check(self) -> None:
        """Raises UserError where a setting can't be used."""
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps={self.steps} can't be walked: give a number from 1 to {MOST_STEPS}.")
        for name in ("guidance", "given_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} is no weight: give a number, for example 3.")
        if self.solver not in SOLVERS:
            raise UserError(f"There is no solver {self.solver!r}: choose one of {', '.join(SOLVERS)}.")
        if self.guidance_method not in METHODS:
            raise UserError(
                f"There is no way of guidance {self.guidance_method!r}: choose one of {', '.join(METHODS)}."
            )
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"guidance_interval={low:g}, {high:g} is no interval: give 0 ≤ lowest ≤ highest ≤ 1."
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale={self.guidance_rescale:g} is not between 0 and 1.")


@dataclasses.dataclass(frozen=True)
class Task:
    """A canvas to fill.

    Attributes:
      canvas: what is given, and where σ starts.
      words: (seconds from which they hold, prompt); none: painted without words.
      settings: of the sampler.
    """

    canvas: Canvas
    words: Words = ()
    settings: Settings = dataclasses.field(default_factory=Settings)


def transformer(bundle: Bundle) -> DiT:
    """The model's transformer.

    Raises:
      UserError: the model is an autoencoder only.
    """
    if bundle.dit is None:
        raise UserError(
            f"The model {bundle.name!r} is an autoencoder only: it can reconstruct, but not generate."
        )
    return bundle.dit


def window(bundle: Bundle, frame_tokens: int) -> int:
    """The most latent frames that the model sees at once, of so many tokens each; 0 if not even one."""
    limits, by = bundle.limits, transformer(bundle).config.patch[0]
    fit = limits.tokens // max(frame_tokens, 1) * by
    return min(fit, limits.latent_frames or fit)


def fill(
    bundle: Bundle, encoder: TextEncoder, tasks: Sequence[Task], progress: Progress | None = None
) -> list[Canvas]:
    """Fills canvases, whose shapes may all differ, packed into rows together.

    Each result is what its task gives alone, up to rounding.

    Args:
      encoder: of the tasks' words.
      progress: called with (steps done, steps in all).

    Raises:
      UserError: a setting is impossible, a frame is larger than the model holds, or the tasks differ in solver,
        which is one for a batch.
    """
    for task in tasks:
        task.settings.check()
    if len({task.settings.solver for task in tasks}) > 1:
        raise UserError("What is made in one batch shares its solver: make it apart, or choose one.")
    jobs = [_Job(bundle, task) for task in tasks]
    rounds = max((len(job.windows) for job in jobs), default=0)
    steps: list[int] = []  # of a round; the first one's is every other's share of the whole
    for number in range(rounds):
        busy = [job for job in jobs if number < len(job.windows)]
        report = None
        if progress is not None:

            def report(done: int, of: int, number: int = number) -> None:
                steps.append(of)
                progress(number * steps[0] + done * steps[0] // of, rounds * steps[0])

        pieces = [piece for job in busy for piece in job.pieces(number)]
        filled = iter(_sample(bundle, encoder, pieces, report))
        for job in busy:
            job.take(number, filled)
    return [job.canvas for job in jobs]


def _sample(
    bundle: Bundle, encoder: TextEncoder, pieces: Sequence[_Piece], progress: Progress | None
) -> list[np.ndarray]:
    """Fills one window of each canvas; returns their latents."""
    dit = transformer(bundle)
    config, limits = dit.config, bundle.limits
    states = _told(encoder, [piece.words for piece in pieces])
    runs = [
        to_run(piece.canvas, config.patch, text, time, config.coords, _name(piece.words))
        for piece, (text, time) in zip(pieces, states, strict=True)
    ]
    pack = functools.partial(
        pack_rows, row_tokens=limits.tokens, row_text=limits.row_text, max_runs=MOST_RUNS
    )
    needed = len(pack(runs, conditions=MOST_CONDITIONS)[0].segment_ids)
    rows = min(needed, MOST_ROWS)
    full = math.ceil(needed / rows) * rows
    batch, places = pack(runs, rows=full, conditions=MOST_CONDITIONS)
    negative = None
    if any(piece.settings.negative for piece in pieces):
        negative = _negative(encoder, pieces, batch, places)
    noise = np.zeros_like(batch.patches)
    for piece, place in zip(pieces, places, strict=True):
        noise[place.row, place.start : place.start + place.length] = patchify(piece.noise, config.patch)
    sigmas, guidance = _plan([piece.settings for piece in pieces], places, batch, bundle.base_tokens)

    # Every call has the same shapes, whatever the canvases': one compilation.
    parts = [slice(first, first + rows) for first in range(0, full, rows)]
    out = []
    for done, part in enumerate(parts):
        report = None
        if progress is not None:

            def report(step: int, of: int, done: int = done) -> None:
                progress(done * of + step, len(parts) * of)

        few = functools.partial(jax.tree.map, lambda leaf, part=part: leaf[part])
        out.append(
            sample(
                dit,
                few(batch),
                noise[part],
                sigmas[:, part],
                few(guidance),
                pieces[0].settings.solver,
                None if negative is None else few(negative),
                report,
            )
        )
    return [
        unpatchify(patches, piece.canvas.grid, config.patch)
        for patches, piece in zip(unpack(np.concatenate(out), places), pieces, strict=True)
    ]


def _negative(
    encoder: TextEncoder, pieces: Sequence[_Piece], batch: PackedBatch, places: Sequence[Placement]
) -> PackedBatch:
    """The same rows with the words for what is not to be seen."""
    words: list[Words] = [((0.0, p.settings.negative),) if p.settings.negative else () for p in pieces]
    text, ids = np.zeros_like(batch.text), np.zeros_like(batch.text_segment_ids)
    conditions = np.zeros_like(ids)
    used = np.zeros(len(ids), int)
    for (states, _), place in zip(_told(encoder, words), places, strict=True):
        slots = slice(used[place.row], used[place.row] + len(states))
        if slots.stop > ids.shape[1]:
            raise UserError("The negative prompts of this batch are too long together: shorten them.")
        text[place.row, slots], ids[place.row, slots] = states, place.segment
        entries = np.flatnonzero(batch.condition_runs[place.row] == place.segment)
        conditions[place.row, slots] = entries[0] if entries.size else 0
        used[place.row] = slots.stop
    return dataclasses.replace(
        batch,
        text=text,
        text_segment_ids=ids,
        text_time=np.zeros_like(batch.text_time),
        text_condition_ids=conditions,
    )


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one run of the sampler fills."""

    canvas: Canvas
    noise: np.ndarray
    words: Words
    settings: Settings


class _Job:
    """A task on its way: its canvas as far as it is filled, and the windows that are left."""

    def __init__(self, bundle: Bundle, task: Task) -> None:
        self.task, self.canvas, self.patch = task, task.canvas, transformer(bundle).config.patch
        t, y, x = task.canvas.grid
        limits = bundle.limits
        self.places = [(0, 0, y, x)]
        frame_tokens = y * x // math.prod(self.patch[1:])
        if limits.frame_tokens and frame_tokens > limits.frame_tokens and task.canvas.start.max() < 1:
            self.places = space_windows((y, x), self.patch, limits.frame_tokens)
            frame_tokens = math.prod(self.places[0][2:]) // math.prod(self.patch[1:])
        most = window(bundle, frame_tokens)
        by = self.patch[0]
        if most < min(t, 2 * by):
            raise UserError(
                f"Frames of {frame_tokens} tokens are more than the model {bundle.name!r} holds in a row of "
                f"{limits.tokens}: choose a lower resolution."
            )
        self.windows = windows(task.canvas, most, max(most // by // 2, 1) * by, by)
        count = t * y * x // math.prod(self.patch)
        width = math.prod(self.patch) * task.canvas.latent.shape[3]
        draw = np.random.default_rng(task.settings.seed).standard_normal((count, width))
        self.noise = unpatchify(draw.astype(np.float32), (t, y, x), self.patch)

    def pieces(self, number: int) -> list[_Piece]:
        seen, _ = self.windows[number]
        part = self.canvas.part(seen)
        return [
            _Piece(
                part.crop(*place) if len(self.places) > 1 else part,
                self.noise[seen, place[0] : place[0] + place[2], place[1] : place[1] + place[3]],
                self.task.words,
                self.task.settings,
            )
            for place in self.places
        ]

    def take(self, number: int, filled: Any) -> None:
        seen, new = self.windows[number]
        latents = [next(filled) for _ in self.places]
        whole = blend_windows(latents, self.places, self.canvas.grid[1:])
        latent, start = self.canvas.latent.copy(), self.canvas.start.copy()
        fresh = np.s_[new.start - seen.start : new.stop - seen.start]
        painted = start[new][..., None] > 0
        latent[new] = np.where(painted, whole[fresh], latent[new])
        start[new] = 0
        self.canvas = dataclasses.replace(self.canvas, latent=latent, start=start)


def _told(encoder: TextEncoder, words: Sequence[Words]) -> list[tuple[np.ndarray, np.ndarray]]:
    """States float[m,E] of each task's prompts, and the seconds from which each of them holds."""
    prompts = [prompt for cards in words for _, prompt in cards if prompt.strip()]
    states = iter(encoder.encode(prompts) if prompts else ())
    out = []
    for cards in words:
        own = [(start, next(states)) for start, prompt in cards if prompt.strip()]
        text = np.concatenate([s for _, s in own]) if own else np.zeros((0, encoder.width), np.float32)
        time = (
            np.concatenate([np.full(len(s), at, np.float32) for at, s in own])
            if own
            else np.zeros(0, np.float32)
        )
        out.append((text, time))
    return out


def _name(words: Words) -> str:
    return " / ".join(prompt for _, prompt in words)


def _plan(
    settings: Sequence[Settings], places: Sequence[Placement], batch: PackedBatch, base_tokens: float
) -> tuple[np.ndarray, Guidance]:
    """Levels [steps+1,B,S] and guidance by entry of the table; each run has its own, wherever it lies."""
    steps = max(own.steps for own in settings)
    sigmas = np.zeros((steps + 1, *batch.condition_runs.shape), np.float32)
    for own, place in zip(settings, places, strict=True):
        mine = batch.condition_runs[place.row] == place.segment
        starts = batch.condition_start[place.row, mine]
        if starts.size:
            factor = flow.shift_factor(jnp.array(place.length), base_tokens)
            levels = np.asarray(flow.schedule(own.steps, factor, float(starts.max())))
            sigmas[: own.steps + 1, place.row, mine] = np.minimum(levels[:, None], starts)
    return sigmas, tabulate([own.weights for own in settings], places, batch.condition_runs)
