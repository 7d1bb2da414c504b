"""Streams of segments, given by their shapes: what a training set sends to a packer. The latents are noise."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from sora_jax.config import component
from sora_jax.data.data_config import DataConfig
from sora_jax.tokens.packing import Segment
from sora_jax.tokens.patches import coordinates

ROOT = pathlib.Path(__file__).parents[2]
CHANNELS, TEXT_WIDTH = 16, 384


@dataclasses.dataclass(frozen=True)
class Shape:
    """A clip's latent frames, rows and columns in tokens, and the tokens of its caption."""

    t: int
    y: int
    x: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return self.t * self.y * self.x


def toyworld(rng: np.random.Generator) -> Shape:
    """configs/toyworld_dit.py: images and clips of 1 to 3 seconds, four aspect ratios, two resolutions and rates."""
    frames, height, width, _ = _TOYWORLD[rng.integers(len(_TOYWORLD))]
    y, x = height // 8, width // 8
    if y * x > 144:  # cropped, as the pipeline does
        y = x = 12
    return Shape(min(1 + (frames - 1) // 4, 4096 // (y * x)), y, x, int(rng.integers(9, 31)))


def web(rng: np.random.Generator) -> Shape:
    """Clips as they are cut from the web, with images among them.

    Durations: log-normal with a mean of 8.5 s and captions of 13 words on average, as Panda-70M reports (Chen et al.
    2024, table 1); clips longer than a sequence of 4,096 tokens are cut to it. Assumed: a fifth images, three
    resolutions alike often, aspect ratios of 16:9 (70%), 9:16 (15%), 4:3 (10%), 1:1 (5%); two latent frames a second.
    """
    short = (4, 6, 8)[rng.integers(3)]
    ratio = (16 / 9, 9 / 16, 4 / 3, 1.0)[rng.choice(4, p=(0.7, 0.15, 0.1, 0.05))]
    y, x = (short, round(short * ratio)) if ratio >= 1 else (round(short / ratio), short)
    seconds = 0.0 if rng.random() < 0.2 else np.clip(rng.lognormal(np.log(8.5) - 0.32, 0.8), 1, 60)
    text_tokens = int(np.clip(rng.normal(18, 6), 5, 48))
    return Shape(min(1 + round(2 * seconds), 4096 // (y * x)), y, x, text_tokens)


def hostile(rng: np.random.Generator) -> Shape:
    """A few that nearly fill a sequence, among many tiny ones."""
    if rng.random() < 0.02:
        return Shape(31, 8, 16, 40)
    return Shape(1, 2, int(rng.integers(2, 17)), 8)


STREAMS: dict[str, Callable[[np.random.Generator], Shape]] = {
    "toyworld": toyworld,
    "web": web,
    "hostile": hostile,
}


class Stream:
    """Segments of a stream's shapes, each the same whenever it is asked for.

    Args:
      lengths: cut each clip to the longest of these numbers of latent frames that it fills; empty: it stays whole.
    """

    def __init__(self, name: str, lengths: tuple[int, ...] = ()) -> None:
        self.name, self.lengths = name, lengths

    def __len__(self) -> int:
        return 1_000_000

    def shape(self, index: int) -> Shape:
        shape = STREAMS[self.name](np.random.default_rng((index, 0)))
        if not self.lengths:
            return shape
        return dataclasses.replace(shape, t=max(t for t in self.lengths if t <= shape.t))

    def shapes(self, count: int) -> list[Shape]:
        return [self.shape(index) for index in range(count)]

    def __getitem__(self, index: int) -> Segment:
        return make_segment(self.shape(index), np.random.default_rng((index, 1)))


def make_segment(shape: Shape, rng: np.random.Generator) -> Segment:
    """A segment of that shape; to be generated as a whole."""
    noise = lambda *sides: rng.standard_normal(sides, np.float32)
    text_time = np.zeros(shape.text_tokens, np.float32)
    return Segment(
        patches=noise(shape.tokens, CHANNELS),
        coords=coordinates((shape.t, shape.y, shape.x), (1, 1, 1), fps=8.0),
        init_sigma=np.ones(shape.tokens, np.float32),
        caption_time=np.zeros(shape.tokens, np.float32),
        text=noise(shape.text_tokens, TEXT_WIDTH),
        text_time=text_time,
    )


def _toyworld_shapes() -> tuple[tuple[int, int, int, float], ...]:
    import runpy

    config = runpy.run_path(str(ROOT / "configs" / "toyworld_dit.py"))["get_config"]()
    return component(DataConfig, config.data, "data").shapes()


_TOYWORLD = _toyworld_shapes()
