"""Denoising canvases: windows in time and space are packed together and sampled by one batcher.

A canvas may be longer than a packed sequence: it is denoised in windows that overlap in time, and what has been
generated conditions the next. Windows of all canvases are in one batcher, whose compiled step has the same shapes
throughout. Latents come out one by one, while later windows are still to be sampled (`pipeline/windows.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import zero_init_sigma
from sora_jax.errors import UserError
from sora_jax.models.attention.dispatch import choose
from sora_jax.models.text import TextEncoder
from sora_jax.models.wan import WanPair
from sora_jax.pipeline.batching import BatchShape, ContinuousBatcher
from sora_jax.pipeline.job import Captions, Job
from sora_jax.pipeline.model import VideoModel
from sora_jax.pipeline.settings import Progress
from sora_jax.pipeline.windows import Context, WindowedCanvas
from sora_jax.tokens.canvas import Canvas, blend_tiles, to_segment
from sora_jax.tokens.packing import Segment, first_fit_decreasing
from sora_jax.tokens.patches import patchify, unpatchify

MAX_SEGMENTS = 16  # in a packed sequence as long as training's
# The compiled step's sequence is up to so many of training's long: no token knows its place in it, and one long
# sequence packs better than several short ones. Two are what a CPU's caches hold (experiments/batching). By
# attention's backend: the reference's cost grows with the square of the sequence.
LONGEST_SEQUENCE = {"cpu": 2, "gpu": 4, "tpu": 4, "reference": 1}
MAX_CONDITIONS = 32  # pairs of initial sigma and active caption, over its segments
PICTURES_MULTIPLE = 4  # of segments whose pictures there is room for, likewise: up to four share a program
TEXT_MULTIPLE = 64  # of text positions, where sequences are as short as they can be
MAX_HELD = 1 << 26  # bytes of latents; canvases that take more together are denoised one after another


def denoise(
    model: VideoModel, jobs: Sequence[Job], canvases: Sequence[Canvas], progress: Progress | None = None
) -> list[Canvas]:
    """Denoises canvases whole: collects what `iter_latents` yields, and raises what it does."""
    return [
        dataclasses.replace(
            canvas, latent=np.stack(list(latents)), init_sigma=np.zeros(canvas.grid, np.float32)
        )
        for canvas, latents in zip(canvases, iter_latents(model, jobs, canvases, progress), strict=True)
    ]


def iter_latents(
    model: VideoModel, jobs: Sequence[Job], canvases: Sequence[Canvas], progress: Progress | None = None
) -> list[Iterator[np.ndarray]]:
    """Denoises canvases, whose shapes may all differ, packed together.

    Each result is what its job gives alone, up to rounding. A step is taken when a latent is asked for that isn't
    there yet. Jobs are best read one after another: what is finished of others meanwhile is held, so those whose
    latents take more than `MAX_HELD` bytes together wait for one another.

    Args:
      canvases: of the jobs' sketches, `VaeProcessor.prepare_latents`.
      progress: called with (steps done, steps in all), before the first step too.

    Returns:
      Of each job its latent frames in order of time, float32[y,x,c], each as soon as no later window changes it.

    Raises:
      UserError: a frame is larger than the model holds, or the jobs differ in solver or step_cache, which are one for a
        batch.
    """
    for name in ("solver", "step_cache"):
        if len({getattr(job.settings, name) for job in jobs}) > 1:
            raise UserError(f"A batch shares one {name}: make these videos separately, or choose one {name}.")
    if jobs and jobs[0].settings.step_cache:
        _check_cached(model)
    captions = _encode_captions(model.text_encoder, [job.captions or ((0.0, ""),) for job in jobs])
    negatives = _encode_captions(model.text_encoder, [((0.0, job.settings.negative),) for job in jobs])
    active = [
        _ActiveJob(model, job, canvas, text, negative, pictures)
        for job, canvas, text, (negative, _), pictures in zip(
            jobs,
            canvases,
            captions,
            negatives,
            model.encode_pictures([job.sketch for job in jobs]),
            strict=True,
        )
    ]
    steps = _take_steps(model, active, progress)
    return [_drain(job, steps) for job in active]


def _check_cached(model: VideoModel) -> None:
    """Raises UserError where a model's layers can't be cached from step to step."""
    if isinstance(model.dit, WanPair):
        what = "has two transformers, of which one can't go on where the other was"
    elif getattr(model.dit, "offloaded", False):
        what = "is offloaded, a layer at a time"
    elif model.sampling.distilled or model.sampling.sigmas:
        what = "takes few steps, each of them far from the one before"
    else:
        return
    raise UserError(f"The model {model.name!r} {what}: step_cache is 0 for it.")


def _drain(job: _ActiveJob, steps: Iterator[None]) -> Iterator[np.ndarray]:
    for _ in range(len(job.windowed.canvas)):
        while not job.windowed.ready:
            next(steps)
        yield job.windowed.ready.popleft()


def _take_steps(model: VideoModel, jobs: Sequence[_ActiveJob], progress: Progress | None) -> Iterator[None]:
    """Takes a step each time; what it finishes is `ready` then."""
    total, done = sum(job.segment_steps for job in jobs), 0
    if progress is not None:
        progress(0, total)
    for group in _groups([job for job in jobs if job.steps_left]):
        for advanced in _take_group_steps(model, group):
            done += advanced
            if progress is not None:
                progress(done, total)
            yield


def _groups(jobs: Sequence[_ActiveJob]) -> Iterator[list[_ActiveJob]]:
    """Jobs that are denoised together, in order: as many as can be held while one of them is read."""
    group: list[_ActiveJob] = []
    held = 0
    for job in jobs:
        size = 4 * math.prod(job.windowed.canvas.latent.shape)
        if group and held + size > MAX_HELD:
            yield group
            group, held = [], 0
        group.append(job)
        held += size
    yield group


def _take_group_steps(model: VideoModel, jobs: Sequence[_ActiveJob]) -> Iterator[int]:
    """Takes a step of all jobs each time; yields how many segments it advanced."""
    # The longest first, so that none is left alone at the end.
    pending = {job: job.segments() for job in sorted(jobs, key=lambda job: -job.steps_left)}
    segments = [segment for own in pending.values() for segment, _ in own.values()]
    negatives = [job.negative_text for job, own in pending.items() for _ in own]
    shape = _batch_shape(model, segments, negatives)
    settings = jobs[0].job.settings
    batcher = ContinuousBatcher(model.dit, [shape], settings.solver, settings.step_cache)
    sampled: dict[int, tuple[_ActiveJob, int]] = {}
    while pending or batcher.busy:
        for job, own in pending.items():
            sampled |= {job.add(batcher, *segment): (job, tile) for tile, segment in own.items()}
        pending = {}
        for uid, patches in batcher.step().items():
            job, tile = sampled.pop(uid)
            # Windows follow one another: what is generated conditions the next.
            if job.put(tile, patches) and job.steps_left:
                pending[job] = job.segments()
        yield batcher.advanced


def _batch_shape(
    model: VideoModel, segments: Sequence[Segment], negatives: Sequence[np.ndarray | None]
) -> BatchShape:
    """A sequence as long as training's, or longer where the segments need it, with room for their text.

    One for the whole batch: a smaller one for what is left at the end would be compiled in the middle. Where
    `Limits.seq_multiple` says so, one as short as the segments allow.
    """
    limits = model.bundle.limits
    longest = limits.tokens * LONGEST_SEQUENCE[_backend(model)]
    if multiple := limits.seq_multiple:
        up = lambda count, to: -(-count // to) * to
        tokens = [len(segment.patches) for segment in segments]
        words = [
            max(len(segment.text), len(segment.text if own is None else own))
            for segment, own in zip(segments, negatives, strict=True)
        ]
        seq_len = up(max(min(sum(tokens), longest), max(tokens)), multiple)
        at_once = min(len(segments), max(seq_len // min(tokens), 1), MAX_SEGMENTS)
        pictures = limits.pictures * up(at_once, PICTURES_MULTIPLE)
        return BatchShape(1, seq_len, up(sum(words), TEXT_MULTIPLE), MAX_SEGMENTS, MAX_CONDITIONS, pictures)
    shape = lambda times, text: BatchShape(
        1, times * limits.tokens, text * limits.text_len, times * MAX_SEGMENTS, times * MAX_CONDITIONS
    )
    rows = lambda shape: len(first_fit_decreasing(segments, *shape.limits))
    times = min(rows(shape(1, 1)), longest // limits.tokens)
    text = next(n for n in range(1, times + 1) if rows(shape(times, n)) == rows(shape(times, times)))
    return shape(times, text)


def _backend(model: VideoModel) -> str:
    """Attention's, for this model here."""
    config = model.dit.config
    return choose(config.attention, config.dtype, config.width // config.heads)


class _ActiveJob:
    """A job being denoised, as segments: one a window, or one a tile of its frame where that is too large."""

    def __init__(
        self,
        model: VideoModel,
        job: Job,
        canvas: Canvas,
        text_states: tuple[np.ndarray, np.ndarray],
        negative_text: np.ndarray,
        pictures: np.ndarray | None,
    ) -> None:
        self.job, self.text_states, self.pictures = job, text_states, pictures
        self.negative_text = negative_text if len(negative_text) else None
        self.config, self.bundle = model.dit.config, model.bundle
        self.boundary = model.dit.boundary_sigma if isinstance(model.dit, WanPair) else 0.0
        patch = self.config.patch
        t, y, x = canvas.grid
        self.tiles = model.spatial_tiles((y, x), from_noise=bool(canvas.init_sigma.max() == 1))
        frame_tokens = math.prod(self.tiles[0][2:]) // math.prod(patch[1:])
        max_frames = model.max_latent_frames(frame_tokens)
        pt = patch[0]
        if max_frames < min(t, 2 * pt):
            raise UserError(
                f"Frames of {frame_tokens} tokens are more than the model {model.name!r} holds in a sequence of "
                f"{model.bundle.limits.tokens}: choose a lower resolution."
            )
        shots = tuple(start for start, _ in job.captions) or (0.0,)
        own = job.settings
        context = Context(max(max_frames // pt // 2, 1) * pt, own.context_noise, own.anchor, shots)
        # `steps` are those from pure noise: what starts at a lower sigma skips the first ones.
        factor = model.bundle.shift_factor(model.segment_tokens(frame_tokens, t))
        share = float(flow.unshift(jnp.array(canvas.init_sigma.max()), factor))
        self.steps = max(math.ceil(own.steps * share - 1e-3), 1)
        self.sigmas = own.sigmas or model.bundle.fixed_sigmas(own.steps)
        if self.sigmas:
            self.steps = 1 + sum(sigma < canvas.init_sigma.max() for sigma in self.sigmas)
        self.windowed = WindowedCanvas(canvas, max_frames, context, patch, job.settings.seed, job.noise)
        self.denoised: dict[int, np.ndarray] = {}  # by tile, of the next window
        self.own_frames = 0  # of that window, without those beside it
        self._skip()

    @property
    def steps_left(self) -> int:
        """Steps until it is done, if it never waits."""
        return len(self.windowed.windows) * self.steps

    @property
    def segment_steps(self) -> int:
        """Steps of all segments that it still takes."""
        windows = [self.windowed.canvas.init_sigma[frames].any(0) for _, frames in self.windowed.windows]
        return self.steps * sum(
            bool(start[top : top + high, left : left + wide].any())
            for start in windows
            for top, left, high, wide in self.tiles
        )

    def segments(self) -> dict[int, tuple[Segment, np.ndarray]]:
        """The segments of its next window and their noise float[n,P], by tile, but for those all of conditioning."""
        part, noise = self.windowed.next_window()
        self.own_frames = len(part)
        key = " / ".join(prompt for _, prompt in self.job.captions)
        patch, coords = self.config.patch, self.config.coords
        out = {}
        for tile, (top, left, high, wide) in enumerate(self.tiles):
            if tile not in self.denoised:
                shown = self._tile(part, tile).with_beside()
                own = np.zeros(shown.latent.shape, np.float32)  # what is beside it has none
                own[: len(part)] = noise[:, top : top + high, left : left + wide]
                segment = to_segment(shown, patch, *self.text_states, coords, key, self.pictures)
                out[tile] = segment, patchify(own, patch)
        return out

    def add(self, batcher: ContinuousBatcher, segment: Segment, noise: np.ndarray) -> int:
        """Adds one of its segments to the batcher; returns its uid."""
        guidance = self.job.settings.as_guidance
        if not len(segment.text) and self.negative_text is None:  # no text to be guided by: one pass suffices
            guidance = dataclasses.replace(guidance, text=1.0, low_text=1.0)
        guidance = dataclasses.replace(guidance, boundary=self.boundary)
        tokens = len(segment.patches)
        begin = float(segment.init_sigma.max())
        sigmas = np.asarray(self.bundle.schedule(self.steps, tokens, begin, self.sigmas))
        if self.job.settings.guidance_method == "zero" and guidance.passes() > 1 and guidance.high == 1:
            guidance = dataclasses.replace(
                guidance, zero_init_sigma=zero_init_sigma(self.bundle.shift_factor(tokens))
            )
        return batcher.add(segment, noise, sigmas, guidance, self.negative_text)

    def put(self, tile: int, patches: np.ndarray) -> bool:
        """Takes a denoised tile of its window; true where that was the window's last."""
        _, _, high, wide = self.tiles[tile]
        frames = len(patches) * math.prod(self.config.patch) // (high * wide)
        latent = unpatchify(patches, (frames, high, wide), self.config.patch)
        self.denoised[tile] = latent[: self.own_frames]
        if done := self._next():
            self._skip()
        return done

    def _tile(self, part: Canvas, tile: int) -> Canvas:
        return part if len(self.tiles) == 1 else part.crop(*self.tiles[tile])

    def _skip(self) -> None:
        """Takes conditioning as it is: tiles of the next window with nothing to generate, and such windows."""
        while self.windowed.windows:
            part, _ = self.windowed.next_window()
            shown = {tile: self._tile(part, tile) for tile in range(len(self.tiles))}
            given = lambda own: not own.init_sigma[self.windowed.fresh].any()
            self.denoised = {tile: own.latent for tile, own in shown.items() if given(own)}
            if not self._next():
                return

    def _next(self) -> bool:
        """Goes to the next window where this one is denoised."""
        if len(self.denoised) < len(self.tiles):
            return False
        latents = [self.denoised[tile] for tile in range(len(self.tiles))]
        self.windowed.put(blend_tiles(latents, self.tiles, self.windowed.canvas.grid[1:]))
        self.denoised = {}
        return True


def _encode_captions(
    encoder: TextEncoder, captions: Sequence[Captions]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Text states float[m,E] of each job's captions, and the seconds float[m] from which each of them holds."""
    # An empty caption is no caption; models of T5 were trained with its end token.
    is_said = lambda prompt: bool(prompt.strip()) or encoder.config.kind == "t5"
    prompts = [prompt for own in captions for _, prompt in own if is_said(prompt)]
    states = iter(encoder.encode(prompts) if prompts else ())
    out = []
    for own in captions:
        timed = [(start, next(states)) for start, prompt in own if is_said(prompt)]
        text = [np.zeros((0, encoder.width), np.float32), *(state for _, state in timed)]
        time = [np.full(len(state), start, np.float32) for start, state in timed]
        out.append((np.concatenate(text), np.concatenate([np.zeros(0, np.float32), *time])))
    return out
