"""A tiny transformer and a packed batch of every kind of segment, for the tests of the sampler and of guidance."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from helpers.packed import pack_segments
from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import METHODS, Guidance
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.tokens.packing import PackedBatch, Placement, Segment
from sora_jax.tokens.patches import coordinates

CONFIG = DiTConfig(
    size="",
    width=24,
    layers=1,
    heads=2,
    mlp_ratio=2,
    channels=2,
    text_width=6,
    absolute=True,
    pooled_text=True,
    dtype="float32",
    attention="reference",
)
ROWS, N, M, K, S = 2, 20, 6, 3, 5


def wave(*shape: int, pitch: float = 1.0) -> np.ndarray:
    """Numbers of variance near 1 that look random and are the same in every version of every library."""
    phase = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    return (
        (1.4 * np.sin(pitch * 12.9898 * phase + 0.7 * np.sin(phase * 78.233)))
        .reshape(shape)
        .astype(np.float32)
    )


def make_dit() -> DiT:
    """A model in which no parameter is zero, so that every condition matters."""
    shapes = jax.eval_shape(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def make_segment(
    i: int,
    grid: tuple[int, int, int],
    words: int,
    starts: tuple[float, ...],
    cards: tuple[float, ...] = (0.0,),
) -> Segment:
    """Segment number i: its tokens start at `starts` in turn, and its words hold from `cards` in turn."""
    coords = coordinates(grid, CONFIG.patch, fps=8.0)
    n = len(coords)
    return Segment(
        patches=wave(n, CONFIG.patch_width, pitch=1 + 0.1 * i),
        coords=coords,
        init_sigma=np.resize(np.array(starts, np.float32), n),
        caption_time=np.sort(np.resize(np.array(cards, np.float32), n)),
        text=wave(words, CONFIG.text_width, pitch=2 + 0.1 * i),
        text_time=np.resize(np.array(cards, np.float32), words),
    )


SEGMENTS = [
    make_segment(0, (3, 4, 4), 3, (0.0, 1.0, 1.0)),  # tokens are given among those to be generated
    make_segment(1, (1, 4, 6), 2, (1.0,)),
    make_segment(2, (2, 4, 4), 2, (1.0, 0.5, 0.0, 0.5)),  # and to be partially noised
    make_segment(3, (1, 4, 4), 0, (0.7,)),
    make_segment(4, (2, 2, 4), 2, (1.0,), (0.0, 0.25)),  # a storyboard
]
SETTINGS = [
    Guidance(text=3.0, conditioning=2.0),
    Guidance(text=2.0, method=METHODS.index("zero"), zero_init_sigma=0.95),
    Guidance(text=4.0, conditioning=1.5, method=METHODS.index("apg"), norm_threshold=0.2),
    Guidance(),
    Guidance(text=3.0, rescale=0.7, low=0.2, high=0.9),
]
STEPS = [6, 4, 5, 6, 3]
MAX_STEPS = max(STEPS)


def pack(segments: list[Segment]) -> tuple[PackedBatch, list[Placement]]:
    return pack_segments(segments, N, M, K, batch_size=ROWS, conditions=S - 1)


def make_noise(places: list[Placement], numbers: list[int]) -> np.ndarray:
    """Noise [B, N, P] of the segments of these numbers."""
    noise = np.zeros((ROWS, N, CONFIG.patch_width), np.float32)
    for place, i in zip(places, numbers, strict=True):
        own = wave(place.length, CONFIG.patch_width, pitch=3 + 0.1 * i)
        noise[place.row, place.start : place.start + place.length] = own
    return noise


def make_sigmas(
    batch: PackedBatch, places: list[Placement], each_steps: list[int], most: int = MAX_STEPS
) -> np.ndarray:
    """Levels [most + 1, B, S]: a segment's entries wait until its schedule comes down to where they start."""
    sigmas = np.zeros((most + 1, *batch.condition_segment_ids.shape), np.float32)
    for place, steps in zip(places, each_steps, strict=True):
        for entry in np.flatnonzero(batch.condition_segment_ids[place.row] == place.segment_id):
            own = np.minimum(flow.schedule(steps, 2.0), batch.condition_init_sigma[place.row, entry])
            sigmas[: steps + 1, place.row, entry] = own
    return sigmas


def with_words(segment: Segment, i: int) -> Segment:
    """The segment with other words, which hold all the time: its negative."""
    return dataclasses.replace(
        segment, text=wave(2, CONFIG.text_width, pitch=5 + 0.1 * i), text_time=np.zeros(2, np.float32)
    )


BATCH, PLACES = pack(SEGMENTS)
NOISE = make_noise(PLACES, list(range(len(SEGMENTS))))
SIGMAS = make_sigmas(BATCH, PLACES, STEPS)
