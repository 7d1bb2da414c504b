"""What every ability stands on: sketches to canvases, canvases filled by the one sampler, canvases to frames.

A canvas may be longer than a row of tokens: it is filled in windows that overlap in time, and what has been filled
is given to the next. Canvases of any shapes are packed into rows together; every call of the sampler's compiled
step has the same shapes.
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

from sora_jax.data.packing import PackedBatch, Placement, Run, pack_rows, patchify, unpack, unpatchify
from sora_jax.diffusion import flow
from sora_jax.diffusion.canvas import (
    GROUP,
    Canvas,
    Sketch,
    Stream,
    blend_windows,
    lay_streams,
    make_canvas,
    space_windows,
    to_run,
    windows,
)
from sora_jax.diffusion.guidance import METHODS, Guidance, tabulate
from sora_jax.diffusion.sampler import SOLVERS, sample
from sora_jax.errors import UserError
from sora_jax.models.bundle import Bundle
from sora_jax.models.dit import DiT
from sora_jax.models.text import TextEncoder, load_text_encoder
from sora_jax.models.vae import VAE

MOST_STEPS = 1000
MOST_RUNS = 16  # a row
MOST_ROWS = 4  # a call of the compiled step
MOST_CONDITIONS = 32  # a row: levels and words in force, over its runs
CHUNK = 4  # latent frames that the autoencoder codes at a time

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
    steps: int = 30
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


class Engine:
    """A loaded model. One instance serves any number of canvases, of any shapes."""

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

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latent that holds frames of a size; they are cropped when decoded."""
        patch = self.bundle.dit.config.patch if self.bundle.dit else (1, 1, 1)
        _, *space = self.vae.config.compression
        high, wide = (
            math.ceil(side / (pixels * by)) * by
            for side, pixels, by in zip((height, width), space, patch[1:], strict=True)
        )
        return high, wide

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame."""
        return math.prod(self.cells(height, width)) // math.prod(self.dit.config.patch[1:])

    def window(self, frame_tokens: int) -> int:
        """The most latent frames that the model sees at once, of so many tokens each; 0 if not even one."""
        limits, by = self.bundle.limits, self.dit.config.patch[0]
        fit = limits.tokens // max(frame_tokens, 1) * by
        return min(fit, limits.latent_frames or fit)

    def sigma(self, strength: np.ndarray, frame_tokens: int, latent_frames: int) -> np.ndarray:
        """The noise level where repainting of a strength (share of the solver's way, 0…1) starts."""
        tokens = frame_tokens * min(latent_frames, self.window(frame_tokens))
        factor = flow.shift_factor(jnp.array(tokens), self.bundle.base_tokens)
        levels = np.asarray(flow.shift(jnp.asarray(strength, jnp.float32), factor))
        return np.where(strength <= 0, 0.0, levels).astype(np.float32)

    def encode(self, sketch: Sketch) -> Canvas:
        """Encodes what a sketch knows; frames are padded to whole cells at their edges."""
        T, Y, X, _ = sketch.frames.shape
        sides = [
            side * by for side, by in zip(self.cells(Y, X), self.vae.config.compression[1:], strict=True)
        ]
        padding = [
            ((full - have) // 2, full - have - (full - have) // 2)
            for full, have in zip(sides, (Y, X), strict=True)
        ]
        frames = np.pad(sketch.frames, [(0, 0), *padding, (0, 0)], mode="edge")
        strength = np.pad(sketch.strength, [(0, 0), *padding], mode="edge")
        streams = lay_streams(sketch.fixed)
        if self.bundle.dit is not None and len(streams) == 1:  # whole patches in time too
            count, by = len(streams[0].ends), self.dit.config.patch[0]
            streams = [Stream(0, 1 + GROUP * (math.ceil(count / by) * by - 1))]
        open_frames = (strength == 1).all((1, 2))
        latents = []
        for stream in streams:
            index = np.minimum(np.arange(stream.begin, stream.begin + stream.frames), T - 1)
            known = np.flatnonzero(~open_frames[index])
            count = len(stream.ends)
            needed = 0 if not known.size else 1 + -(-int(known[-1]) // GROUP)
            latent = np.zeros((count, *self.cells(Y, X), self.vae.config.channels), np.float32)
            if needed:
                latent[:needed] = self._encode_stream(frames[index[: 1 + GROUP * (needed - 1)]])
            latents.append(latent)
        tokens = self.frame_tokens(Y, X) if self.bundle.dit else 1
        length = sum(len(stream.ends) for stream in streams)
        start = strength if self.bundle.dit is None else self.sigma(strength, tokens, length)
        return make_canvas(streams, latents, start, sketch.fps, self.vae.config.compression)

    def decode(self, canvas: Canvas, frames: int, height: int, width: int) -> np.ndarray:
        """The first frames of a canvas, and the middle of each: uint8[T,Y,X,3]."""
        return to_bytes(self.decode_floats(canvas, frames, height, width))

    def decode_floats(self, canvas: Canvas, frames: int, height: int, width: int) -> np.ndarray:
        """As `decode`, in [-1, 1]: float32[T,Y,X,3]. Where streams overlap, the later one's frames are kept."""
        _, high, wide = self.vae.config.compression
        full = canvas.grid[1] * high, canvas.grid[2] * wide
        top, left = (full[0] - height) // 2, (full[1] - width) // 2
        out = np.zeros((frames, height, width, 3), np.float32)
        for stream in canvas.streams():
            begin = int(canvas.ends[stream.start])
            clip = self._decode_stream(canvas.latent[stream])[: max(frames - begin, 0)]
            out[begin : begin + len(clip)] = clip[:, top : top + height, left : left + width]
        return out

    def fill(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[Canvas]:
        """Fills canvases, whose shapes may all differ, packed into rows together.

        Each result is what its task gives alone, up to rounding.

        Args:
          progress: called with (steps done, steps in all).

        Raises:
          UserError: a setting is impossible, a frame is larger than the model holds, or the tasks differ in solver,
            which is one for a batch.
        """
        for task in tasks:
            task.settings.check()
        if len({task.settings.solver for task in tasks}) > 1:
            raise UserError("What is made in one batch shares its solver: make it apart, or choose one.")
        jobs = [_Job(self, task) for task in tasks]
        rounds = max((len(job.windows) for job in jobs), default=0)
        for number in range(rounds):
            busy = [job for job in jobs if number < len(job.windows)]
            report = None
            if progress is not None:

                def report(done: int, of: int, number: int = number) -> None:
                    progress(number * of + done, rounds * of)

            pieces = [piece for job in busy for piece in job.pieces(number)]
            filled = iter(self._sample(pieces, report))
            for job in busy:
                job.take(number, filled)
        return [job.canvas for job in jobs]

    def _sample(self, pieces: Sequence[_Piece], progress: Progress | None) -> list[np.ndarray]:
        """Fills one window of each canvas; returns their latents."""
        config, limits = self.dit.config, self.bundle.limits
        states = _told(self.text, [piece.words for piece in pieces])
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
            negative = self._negative(pieces, runs, batch, places)
        noise = np.zeros_like(batch.patches)
        for piece, place in zip(pieces, places, strict=True):
            noise[place.row, place.start : place.start + place.length] = patchify(piece.noise, config.patch)
        sigmas, guidance = _plan([piece.settings for piece in pieces], places, batch, self.bundle.base_tokens)

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
                    self.dit,
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
        self, pieces: Sequence[_Piece], runs: Sequence[Run], batch: PackedBatch, places: Sequence[Placement]
    ) -> PackedBatch:
        """The same rows with the words for what is not to be seen."""
        words: list[Words] = [((0.0, p.settings.negative),) if p.settings.negative else () for p in pieces]
        text, ids = np.zeros_like(batch.text), np.zeros_like(batch.text_segment_ids)
        conditions = np.zeros_like(ids)
        used = np.zeros(len(ids), int)
        for (states, _), place in zip(_told(self.text, words), places, strict=True):
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

    def _encode_stream(self, frames: np.ndarray) -> np.ndarray:
        """uint8[1+4k,Y,X,3] to latents float32[1+k,y,x,c], in pieces of the same shapes whatever the length."""
        head, past = _encode_piece(self.vae, frames[:1][None], None)
        parts = [np.asarray(head[0])]
        for first in range(1, len(frames), GROUP * CHUNK):
            piece = frames[first : first + GROUP * CHUNK]
            short = GROUP * CHUNK - len(piece)
            padded = np.pad(piece, [(0, short), (0, 0), (0, 0), (0, 0)], mode="edge")
            latent, past = _encode_piece(self.vae, padded[None], past)
            parts.append(np.asarray(latent[0])[: len(piece) // GROUP])
        return np.concatenate(parts)

    def _decode_stream(self, latent: np.ndarray) -> np.ndarray:
        """The inverse. Causal layers make what comes later, and the padding, leave the rest as it is to the bit."""
        head, past = _decode_piece(self.vae, latent[:1][None], None)
        parts = [np.asarray(head[0])]
        for first in range(1, len(latent), CHUNK):
            piece = latent[first : first + CHUNK]
            padded = np.pad(piece, [(0, CHUNK - len(piece)), (0, 0), (0, 0), (0, 0)])
            clip, past = _decode_piece(self.vae, padded[None], past)
            parts.append(np.asarray(clip[0])[: GROUP * len(piece)])
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one run of the sampler fills."""

    canvas: Canvas
    noise: np.ndarray
    words: Words
    settings: Settings


class _Job:
    """A task on its way: its canvas as far as it is filled, and the windows that are left."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.task, self.canvas, self.patch = task, task.canvas, engine.dit.config.patch
        t, y, x = task.canvas.grid
        limits = engine.bundle.limits
        self.places = [(0, 0, y, x)]
        frame_tokens = y * x // math.prod(self.patch[1:])
        if limits.frame_tokens and frame_tokens > limits.frame_tokens and task.canvas.start.max() < 1:
            self.places = space_windows((y, x), self.patch, limits.frame_tokens)
            frame_tokens = math.prod(self.places[0][2:]) // math.prod(self.patch[1:])
        most = engine.window(frame_tokens)
        by = self.patch[0]
        if most < min(t, 2 * by):
            raise UserError(
                f"Frames of {frame_tokens} tokens are more than the model {engine.name!r} holds in a row of "
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


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8."""
    return np.round((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)


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


@jax.jit
def _encode_piece(vae: VAE, frames: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    mean, _, past = vae.encode_chunk(frames.astype(jnp.float32) / 127.5 - 1.0, past)
    return (mean - jnp.array(vae.config.latent_mean)) / jnp.array(vae.config.latent_std), past


@jax.jit
def _decode_piece(vae: VAE, latent: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    raw = latent * jnp.array(vae.config.latent_std) + jnp.array(vae.config.latent_mean)
    clip, past = vae.decode_chunk(raw, past)
    return jnp.clip(clip, -1.0, 1.0), past
