"""Filling canvases: windows in time and space, packed into rows together, walked by the one sampler.

A canvas may be longer than a row of tokens: it is filled in windows that overlap in time, and what has been filled
is given to the next. Windows of all canvases stand in one queue, whose compiled step has the same shapes throughout.
Latents come out one by one, while later windows are still to be filled (`pipeline/windows.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from sora_jax.checkpoints.bundle import Bundle
from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import METHODS, Guidance, zero_init
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.errors import UserError
from sora_jax.models.attention.dispatch import choose
from sora_jax.models.dit import DiT
from sora_jax.models.text import TextEncoder
from sora_jax.pipeline.batching import Queue, Request, Room
from sora_jax.pipeline.checks import (
    MOST_SEED,
    check_number,
    check_switch,
    check_text,
    check_whole,
    is_number,
    shown,
)
from sora_jax.pipeline.windows import Windowed
from sora_jax.tokens.canvas import Canvas, blend_windows, space_windows, to_segment
from sora_jax.tokens.packing import Segment, assign_rows
from sora_jax.tokens.patches import patchify, unpatchify

MOST_STEPS = 1000
MOST_GUIDANCE = 100
MOST_FRAMES = 10**9  # that `max_frames` may allow
MAX_SEGMENTS = 16  # in as many slots as training's rows have
# The row of the compiled step is up to so many of training's long: no token knows its place in a row, and
# one long row is filled better than several short ones. Two are what a CPU's caches hold (experiments/batching). By
# attention's backend: the reference's cost grows with the square of the row.
LONGEST_ROW = {"cpu": 2, "gpu": 4, "tpu": 4, "reference": 1}
MAX_CONDITIONS = 32  # levels and words in force there, over its runs
MOST_HELD = 1 << 26  # bytes of latents; canvases that take more together are filled one after another

Progress = Callable[[int, int], None]
Words = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How something is sampled.

    Attributes:
      seed: random seed.
      steps: of the solver, from noise; what is repainted from a strength takes its share of them.
      guidance: weight of the words; 1 is none.
      solver: a name of `solvers.SOLVERS`.
      guidance_method: a name of `guidance.METHODS`; "zero" also leaves out the first 4% of the steps, at least one.
      guidance_interval: (lowest, highest) σ between which guidance acts.
      guidance_rescale: 0 to 1, how far what guidance adds in contrast is taken back, as in diffusers.
      given_guidance: weight of what is given (pictures, clips) apart from the words; 1 is none.
      negative: the negative prompt.
      strict: words that the model doesn't know are refused; otherwise a note names them.
      max_frames: the most frames of a video, and of a batch together; None is what lasts ten minutes at the model's
        highest rate.
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
    strict: bool = False
    max_frames: int | None = None

    @property
    def weights(self) -> Guidance:
        """How strongly it is led."""
        low, high = self.guidance_interval
        method = METHODS.index(self.guidance_method)
        return Guidance(self.guidance, self.given_guidance, low, high, self.guidance_rescale, method)

    def check(self) -> None:
        """Raises UserError where a setting can't be used."""
        check_whole("seed", self.seed, 0, MOST_SEED)
        check_whole("steps", self.steps, 1, MOST_STEPS)
        for name in ("guidance", "given_guidance"):
            # What is far too large ends in numbers that are none, and rows are shared.
            check_number(name, getattr(self, name), least=-MOST_GUIDANCE, most=MOST_GUIDANCE)
        if self.solver not in SOLVERS:
            raise UserError(f"There is no solver {shown(self.solver)}: choose one of {', '.join(SOLVERS)}.")
        if self.guidance_method not in METHODS:
            raise UserError(
                f"There is no way of guidance {shown(self.guidance_method)}: choose one of {', '.join(METHODS)}."
            )
        try:
            low, high = self.guidance_interval
        except (TypeError, ValueError):
            low = high = math.nan
        if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1):
            raise UserError(
                f"guidance_interval={shown(self.guidance_interval)} is no interval: give two numbers, "
                "0 ≤ lowest ≤ highest ≤ 1."
            )
        check_number("guidance_rescale", self.guidance_rescale, least=0, most=1)
        check_text("negative", self.negative)
        check_switch("strict", self.strict)
        if self.max_frames is not None:
            check_whole("max_frames", self.max_frames, 1, MOST_FRAMES)


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


def space_crops(bundle: Bundle, cells: tuple[int, int], blank: bool) -> list[tuple[int, int, int, int]]:
    """Windows (top, left, height, width), in cells, of a frame of `cells` (y, x): each is a segment of its own.

    Args:
      blank: whether some of the canvas is painted from nothing. Then a frame is one segment, as its parts would not
        know what the others show; else a frame larger than training's is cut.
    """
    patch, most = transformer(bundle).config.patch, bundle.limits.frame_tokens
    if most and not blank and math.prod(cells) // math.prod(patch[1:]) > most:
        return space_windows(cells, patch, most)
    return [(0, 0, *cells)]


def segment_tokens(bundle: Bundle, frame_tokens: int, latent_frames: int) -> int:
    """Tokens of the first segment of a canvas, which its noise levels are shifted by (`flow.shift_factor`).

    Args:
      frame_tokens: of a latent frame, in one of the `space_crops`.
      latent_frames: of the canvas.
    """
    by = transformer(bundle).config.patch[0]
    return frame_tokens * math.ceil(min(latent_frames, window(bundle, frame_tokens)) / by)


def fill(
    bundle: Bundle, encoder: TextEncoder, tasks: Sequence[Task], progress: Progress | None = None
) -> list[Canvas]:
    """Fills canvases whole: collects what `fill_streams` yields, and raises what it does."""
    streams = fill_streams(bundle, encoder, tasks, progress)
    return [
        dataclasses.replace(
            task.canvas, latent=np.stack(list(latents)), init_sigma=np.zeros(task.canvas.grid, np.float32)
        )
        for task, latents in zip(tasks, streams, strict=True)
    ]


def fill_streams(
    bundle: Bundle, encoder: TextEncoder, tasks: Sequence[Task], progress: Progress | None = None
) -> list[Iterator[np.ndarray]]:
    """Fills canvases, whose shapes may all differ, packed into rows together.

    Each result is what its task gives alone, up to rounding. Steps are walked when a latent is asked for that isn't
    there yet. Tasks are best read one after another: what is finished of others meanwhile is held, so those whose
    latents take more than `MOST_HELD` bytes together wait for one another.

    Args:
      encoder: of the tasks' words.
      progress: called with (steps done, steps in all), before the first step too.

    Returns:
      Of each task its latent frames in order of time, float32[y,x,c], each as soon as no later window changes it.

    Raises:
      UserError: a setting is impossible, a frame is larger than the model holds, or the tasks differ in solver,
        which is one for a batch.
    """
    for task in tasks:
        task.settings.check()
    if len({task.settings.solver for task in tasks}) > 1:
        raise UserError("What is made in one batch shares its solver: make it apart, or choose one.")
    told = _told(encoder, [task.words for task in tasks])
    avoided = _told(encoder, [((0.0, task.settings.negative),) for task in tasks])
    jobs = [
        _Job(bundle, task, words, unwanted)
        for task, words, (unwanted, _) in zip(tasks, told, avoided, strict=True)
    ]
    walk = _walk_all(bundle, jobs, progress)
    return [_drain(job, walk) for job in jobs]


def _drain(job: _Job, walk: Iterator[None]) -> Iterator[np.ndarray]:
    for _ in range(len(job.task.canvas)):
        while not job.windowed.ready:
            next(walk)
        yield job.windowed.ready.popleft()


def _walk_all(bundle: Bundle, jobs: Sequence[_Job], progress: Progress | None) -> Iterator[None]:
    """Walks a step each time; whatever it finishes is `ready` then."""
    steps, done = sum(job.steps for job in jobs), 0
    if progress is not None:
        progress(0, steps)
    for group in _groups([job for job in jobs if job.way]):
        for walked in _walk(bundle, group):
            done += walked
            if progress is not None:
                progress(done, steps)
            yield


def _groups(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Who is walked together, in order: as many as can be held while one of them is read."""
    group: list[_Job] = []
    held = 0
    for job in jobs:
        size = 4 * math.prod(job.task.canvas.latent.shape)
        if group and held + size > MOST_HELD:
            yield group
            group, held = [], 0
        group.append(job)
        held += size
    yield group


def _walk(bundle: Bundle, jobs: Sequence[_Job]) -> Iterator[int]:
    """Walks a step of all jobs each time; yields how many runs it took further."""
    # The longest way first, so that nobody walks on alone at the end.
    asked = {job: job.requests() for job in sorted(jobs, key=lambda job: -job.way)}
    runs = [request.run for requests in asked.values() for request in requests.values()]
    queue = Queue(transformer(bundle), [_room(bundle, runs)], jobs[0].task.settings.solver)
    tickets: dict[int, tuple[_Job, int]] = {}
    while asked or queue.busy:
        for job, requests in asked.items():
            tickets |= {queue.add(request): (job, place) for place, request in requests.items()}
        asked = {}
        for ticket, patches in queue.step().items():
            job, place = tickets.pop(ticket)
            # Windows follow one another: what is filled is given to the next.
            if job.take(place, patches) and job.way:
                asked[job] = job.requests()
        yield queue.walked


def _room(bundle: Bundle, runs: Sequence[Segment]) -> Room:
    """A row as training's, or a longer one where the runs need it, with as many words as it needs for them.

    One for the whole batch: a smaller one for who is left at the end would be compiled in the middle.
    """
    limits = bundle.limits
    room = lambda times, text: Room(
        1, times * limits.tokens, text * limits.text_len, times * MAX_SEGMENTS, times * MAX_CONDITIONS
    )
    rows = lambda room: len(assign_rows(runs, room.tokens, room.text, room.runs, room.conditions))
    config = transformer(bundle).config
    backend = choose(config.attention, config.dtype, config.width // config.heads)
    times = min(rows(room(1, 1)), LONGEST_ROW[backend])
    text = next(text for text in range(1, times + 1) if rows(room(times, text)) == rows(room(times, times)))
    return room(times, text)


class _Job:
    """A task on its way, as runs of the model's: one a window, or one a place of its frame where that is too large."""

    def __init__(
        self, bundle: Bundle, task: Task, words: tuple[np.ndarray, np.ndarray], negative: np.ndarray
    ) -> None:
        self.task, self.words = task, words
        self.negative = negative if len(negative) else None
        self.config, self.base_tokens = transformer(bundle).config, bundle.base_tokens
        patch, limits = self.config.patch, bundle.limits
        t, y, x = task.canvas.grid
        self.places = space_crops(bundle, (y, x), blank=bool(task.canvas.init_sigma.max() == 1))
        frame_tokens = math.prod(self.places[0][2:]) // math.prod(patch[1:])
        most = window(bundle, frame_tokens)
        by = patch[0]
        if most < min(t, 2 * by):
            raise UserError(
                f"Frames of {frame_tokens} tokens are more than the model {bundle.name!r} holds in a row of "
                f"{limits.tokens}: choose a lower resolution."
            )
        context = max(most // by // 2, 1) * by
        # `steps` are those from noise: what begins lower has come a part of the way already.
        factor = flow.shift_factor(jnp.array(segment_tokens(bundle, frame_tokens, t)), self.base_tokens)
        share = float(flow.unshift(jnp.array(task.canvas.init_sigma.max()), factor))
        self.run_steps = max(math.ceil(task.settings.steps * share - 1e-3), 1)
        self.windowed = Windowed(task.canvas, most, context, patch, task.settings.seed)
        self.filled: dict[int, np.ndarray] = {}  # by place
        self._skip()

    @property
    def way(self) -> int:
        """Steps until it is done, if it never waits."""
        return len(self.windowed.windows) * self.run_steps

    @property
    def steps(self) -> int:
        """Of all runs that it still takes."""
        windows = [self.task.canvas.init_sigma[new].any(0) for _, new in self.windowed.windows]
        return self.run_steps * sum(
            bool(start[top : top + high, left : left + wide].any())
            for start in windows
            for top, left, high, wide in self.places
        )

    def requests(self) -> dict[int, Request]:
        """The runs that fill its next window, by their place in the frame, but for those of which nothing is open."""
        part, noise = self.windowed.look()
        return {
            place: self._request(self._at(part, place), noise[:, top : top + high, left : left + wide])
            for place, (top, left, high, wide) in enumerate(self.places)
            if place not in self.filled
        }

    def _at(self, part: Canvas, place: int) -> Canvas:
        return part if len(self.places) == 1 else part.crop(*self.places[place])

    def _skip(self) -> None:
        """Takes what is given whole as it is: places of the next window of which nothing is open, and such windows."""
        while self.windowed.windows:
            part, _ = self.windowed.look()
            shown = {place: self._at(part, place) for place in range(len(self.places))}
            self.filled = {place: own.latent for place, own in shown.items() if not own.init_sigma.any()}
            if not self._advance():
                return

    def _request(self, canvas: Canvas, noise: np.ndarray) -> Request:
        name = " / ".join(prompt for _, prompt in self.task.words)
        run = to_segment(canvas, self.config.patch, *self.words, self.config.coords, name)
        weights = self.task.settings.weights
        if (
            not len(run.text) and self.negative is None
        ):  # nothing to be led by, so one answer of the model does
            weights = dataclasses.replace(weights, text=1.0)
        factor = flow.shift_factor(jnp.array(len(run.patches)), self.base_tokens)
        levels = np.asarray(flow.schedule(self.run_steps, factor, float(run.init_sigma.max())))
        if self.task.settings.guidance_method == "zero" and weights.passes() > 1 and weights.high == 1:
            weights = dataclasses.replace(weights, hold=zero_init(factor))
        return Request(run, patchify(noise, self.config.patch), levels, weights, self.negative)

    def take(self, place: int, patches: np.ndarray) -> bool:
        """Takes what fills a place of its window; true where that was the window's last."""
        seen, _ = self.windowed.windows[0]
        _, _, high, wide = self.places[place]
        self.filled[place] = unpatchify(patches, (seen.stop - seen.start, high, wide), self.config.patch)
        advanced = self._advance()
        if advanced:
            self._skip()
        return advanced

    def _advance(self) -> bool:
        """Goes to the next window where this one is filled."""
        if len(self.filled) < len(self.places):
            return False
        latents = [self.filled[place] for place in range(len(self.places))]
        self.windowed.take(blend_windows(latents, self.places, self.task.canvas.grid[1:]))
        self.filled = {}
        return True


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
