"""Frames of any size through the autoencoder, as tiles, and clips of any length, as streams: in constant memory.

The autoencoder's layers are 3×3×3 convolutions and norms of single cells, so they have a finite receptive field (by
default 5 latent cells in the encoder, 9 in the decoder). A tile whose inner edges are that far from what is kept of it
gives what the whole frame gives, up to rounding; most of the receptive field has little effect, so a smaller `halo`
does too. Tiles at the frame's border end there, as the whole frame does. An autoencoder with layers that see whole
frames (attention) is a `SplitAutoencoder`: these run on whole frames, at latent resolution, the rest tile by tile.

All tiles of a frame have one size, so two compiled programs serve it, one for the first chunk of a stream and one
for later ones. It is the size, of no more cells than `Tiles.size` squared, whose tiles overlap least in all: what
is coded twice costs more than to compile for each size of frames. Frames that fit one tile are coded whole.
Tiles are coded one after another and time in chunks: memory holds one tile's activations, one chunk of frames and the
`conv.ConvCache` of each tile, which grows with the frame's size but not with duration.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.models.decode_windows import Windows, split_windows

Key = tuple[int, int]


class LatentSpace(Protocol):
    """What tiles need of an autoencoder's configuration; see `vae.VAEConfig`."""

    @property
    def compression(self) -> tuple[int, int, int]: ...
    @property
    def latent_mean(self) -> tuple[float, ...]: ...
    @property
    def latent_std(self) -> tuple[float, ...]: ...


class Autoencoder(Protocol):
    """What they need of an autoencoder; see `vae.VAE`. Its `tiles`, where it has any, are in place of `TILES`."""

    @property
    def config(self) -> LatentSpace: ...
    def encode_chunk(self, chunk: Any, cache: Any = None, /) -> tuple[jax.Array, jax.Array, Any]: ...
    def decode_chunk(self, latent: Any, cache: Any = None, /) -> tuple[jax.Array, Any]: ...


@runtime_checkable
class SplitAutoencoder(Protocol):
    """One whose two halves have a part for whole frames, at latent resolution, and one for tiles; see `wan_vae`."""

    @property
    def config(self) -> LatentSpace: ...
    def encode_local(self, chunk: Any, cache: Any = None, /) -> tuple[jax.Array, Any]: ...
    def encode_global(self, features: Any, cache: Any = None, /) -> tuple[jax.Array, jax.Array, Any]: ...
    def decode_global(self, latent: Any, cache: Any = None, /) -> tuple[jax.Array, Any]: ...
    def decode_local(self, features: Any, cache: Any = None, /) -> tuple[jax.Array, Any]: ...


@runtime_checkable
class WindowedAutoencoder(Protocol):
    """One whose decoder sees later frames, so that it takes windows of time instead of a stream; see `ltx_vae`."""

    @property
    def config(self) -> LatentSpace: ...
    @property
    def windows(self) -> Windows | None: ...
    def raw_latents(self, latents: Iterable[np.ndarray], /) -> Iterator[np.ndarray]: ...
    def decode(self, latent: Any, /) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How frames and clips are cut.

    Attributes:
      size: latent cells along each side of the largest square tile; a tile has no more than that squared.
      halo: least number of latent cells between a tile's inner edges and what is kept of it.
      blend: latent cells over which one tile is blended into the next, linearly.
      chunk: latent frames coded at a time; the first of a stream is coded alone.

    Raises:
      UserError: tiles of this size would overlap wholly, or a number is negative.
    """

    size: int = 64
    halo: int = 5
    blend: int = 2
    chunk: int = 4

    def __post_init__(self) -> None:
        too_small = self.size - self.overlap < max(2 * self.blend, 1)
        if too_small or min(self.halo, self.blend) < 0 or self.chunk < 1:
            raise UserError(
                f"Tiles of {self.size} latent cells with a halo of {self.halo} and {self.blend} to blend, in chunks "
                f"of {self.chunk}, can't cover a frame: the size exceeds twice the halo by at least three times the "
                "blend, the chunk is at least 1, and none is negative."
            )

    @property
    def overlap(self) -> int:
        """Least number of latent cells that two neighbours share."""
        return 2 * self.halo + self.blend

    def fit(self, config: LatentSpace, height: int, width: int) -> bool:
        """Whether frames of height × width pixels fit one tile."""
        _, high, wide = config.compression
        return height <= self.size * high and width <= self.size * wide

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Latent cells (high, wide) of each tile of a frame of height × width cells."""
        return _shape(self, height, width)

    def starts(self, cells: int, size: int | None = None) -> list[int]:
        """Where tiles of `size` cells begin along a side: the first at 0, the last ends with it, evenly between."""
        size = size or self.size
        if cells <= size:
            return [0]
        count = 1 + math.ceil((cells - size) / (size - self.overlap))
        return [i * (cells - size) // (count - 1) for i in range(count)]

    def cuts(self, cells: int, scale: int, size: int | None = None) -> list[tuple[int, np.ndarray]]:
        """Each tile's begin along a side and its weights there, `scale` of them a cell; they sum to 1 everywhere."""
        starts, size = self.starts(cells, size), min(size or self.size, cells)
        place = (np.arange(size * scale) + 0.5) / scale  # in cells from a tile's begin
        cuts = []
        for i, start in enumerate(starts):
            weights = np.ones(size * scale)
            if i:
                weights *= self._ramp(start + place, starts[i - 1] + size, start)
            if i + 1 < len(starts):
                weights *= 1 - self._ramp(start + place, start + size, starts[i + 1])
            cuts.append((start, weights.astype(np.float32)))
        return cuts

    def cost(self, height: int, width: int) -> float:
        """Latent cells computed for each of a frame of height × width cells."""
        sides = zip((height, width), self.shape(height, width), strict=True)
        return math.prod(len(self.starts(side, size)) * size / side for side, size in sides)

    def _ramp(self, place: np.ndarray, end: int, start: int) -> np.ndarray:
        """The later tile's share around the middle of its overlap with the one before, which ends at `end`."""
        off = place - (start + end) / 2
        return np.clip(off / self.blend + 0.5, 0, 1) if self.blend else (off > 0).astype(float)


@functools.lru_cache(maxsize=1024)
def _shape(tiles: Tiles, height: int, width: int) -> tuple[int, int]:
    """The shape of the tiles that compute the fewest cells; of equals, that of the fewest tiles."""
    choices = []
    for high in _sides(tiles, height):
        for wide in _sides(tiles, width):
            if high * wide <= tiles.size**2:
                count = len(tiles.starts(height, high)) * len(tiles.starts(width, wide))
                choices.append((count * high * wide, count, high, wide))
    *_, high, wide = min(choices)
    return high, wide


def _sides(tiles: Tiles, cells: int) -> list[int]:
    """Lengths of a tile along a side, one for each number of tiles that may cover it."""
    least = tiles.overlap + max(2 * tiles.blend, 1)
    sides = {min(cells, least, tiles.size)}
    for count in range(1, math.ceil(cells / (least - tiles.overlap)) + 1):
        side = math.ceil((cells + (count - 1) * tiles.overlap) / count)
        if count == 1 or side >= least:
            sides.add(side)
    return sorted(sides)


TILES = Tiles()


def tiles_of(vae: Autoencoder) -> Tiles:
    """How an autoencoder's frames are cut where nothing else is asked for."""
    return getattr(vae, "tiles", TILES)


def encode_stream(
    vae: Autoencoder, frames: Iterable[np.ndarray], tiles: Tiles | None = None
) -> Iterator[np.ndarray]:
    """Frames of any number and size to latents, chunk by chunk, each as soon as its frames have been read.

    Args:
      vae: the autoencoder.
      frames: uint8[Y,X,3] each, or float32 from 0 to 255, sides multiples of its compression (uint8[T,Y,X,3] is such an
        iterable too). A last group that is not full is padded with its last frame.
      tiles: how to cut; by default as `tiles_of` says.

    Yields:
      float32[n,y,x,c] as `VAE.to_latent`'s: the first chunk has one latent frame, later ones up to `tiles.chunk`.

    Raises:
      UserError: the frames' sides are no such multiples.
    """
    tiles = tiles or tiles_of(vae)
    time, *space = vae.config.compression
    caches: dict[Key, Any] = {}
    whole: Any = None
    split = isinstance(vae, SplitAutoencoder)
    encode = functools.partial(_encode_local if split else _encode_chunk, vae)
    for chunk, count in _chunks(frames, time * tiles.chunk):
        latent = _code_tiles(encode, chunk, caches, tiles, space, (1, 1))
        if split:
            coded, whole = _encode_global(vae, latent[None], whole)
            latent = np.asarray(coded)[0]
        yield latent[: math.ceil(count / time)]


def decode_stream(
    vae: Autoencoder, latents: Iterable[np.ndarray], tiles: Tiles | None = None
) -> Iterator[np.ndarray]:
    """The inverse, as soon as each chunk of latents has been read.

    Args:
      vae: the autoencoder.
      latents: float32[y,x,c] each, as `encode_stream` gives them (float32[t,y,x,c] is such an iterable too).
      tiles: how to cut; by default as `tiles_of` says.

    Yields:
      float32[n,Y,X,3] in [-1, 1]: the first chunk has one frame, later ones those of the compression for each latent
        frame.
    """
    tiles = tiles or tiles_of(vae)
    if isinstance(vae, WindowedAutoencoder) and vae.windows is not None:
        yield from _decode_windows(vae, latents, tiles, vae.windows)
        return
    time, *space = vae.config.compression
    caches: dict[Key, Any] = {}
    whole: Any = None
    split = isinstance(vae, SplitAutoencoder)
    decode = functools.partial(_decode_local if split else _decode_chunk, vae)
    for first, (chunk, count) in enumerate(_chunks(latents, tiles.chunk)):
        frames = time * count if first else 1
        if split:
            features, whole = _decode_global(vae, chunk[None], whole)
            chunk = np.asarray(features)[0]
        yield _code_tiles(decode, chunk, caches, tiles, (1, 1), space)[:frames]


def _decode_windows(
    vae: WindowedAutoencoder, latents: Iterable[np.ndarray], tiles: Tiles, windows: Windows
) -> Iterator[np.ndarray]:
    """`decode_stream` of a decoder that sees later frames: memory is a window's."""
    time, *space = vae.config.compression
    decode = lambda tile, cache: (_decode_whole(vae, tile), None)
    for window, start, end in split_windows(vae.raw_latents(latents), windows):
        clip = _code_tiles(decode, window, {}, tiles, (1, 1), space)
        for latent in range(start, end):  # parts, so that what is made of them is small
            yield clip[max(time * (latent - 1) + 1, 0) : time * latent + 1]


def _chunks(items: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The first item alone, then `size` at a time, each with its number of items before padding.

    As layers are causal, padding doesn't change the rest by a bit, and all chunks but the first have one shape.
    """
    rest, wanted = iter(items), 1
    while chunk := list(itertools.islice(rest, wanted)):
        yield np.stack(chunk + [chunk[-1]] * (wanted - len(chunk))), len(chunk)
        wanted = size


def _code_tiles(
    code: Callable[[np.ndarray, Any], tuple[jax.Array, Any]],
    chunk: np.ndarray,
    caches: dict[Key, Any],
    tiles: Tiles,
    cell_in: Iterable[int],
    cell_out: Iterable[int],
) -> np.ndarray:
    """Codes a chunk [T,Y,X,C] of a stream tile by tile, and keeps each tile's cache in `caches`.

    Args:
      code: a chunk's tile [1,…] and its cache, None at first, to the result and the cache for the next chunk.
      cell_in, cell_out: height and width of a latent cell in `chunk`, and in the result.
    """
    (a, b), (c, d) = cell_in, cell_out
    Y, X = chunk.shape[1:3]
    if Y % a or X % b:
        raise UserError(f"Frames of {Y}×{X} pixels are no multiple of {a}×{b}: pad them first.")
    high, wide = tiles.shape(Y // a, X // b)
    rows, columns = tiles.cuts(Y // a, c, high), tiles.cuts(X // b, d, wide)
    out: np.ndarray | None = None
    for (top, across), (left, along) in itertools.product(rows, columns):
        tile = chunk[None, :, top * a : (top + high) * a, left * b : (left + wide) * b]
        coded, caches[top, left] = code(tile, caches.get((top, left)))
        part = np.asarray(coded)[0]
        if len(rows) == len(columns) == 1:
            return part
        if out is None:
            out = np.zeros((len(part), Y // a * c, X // b * d, part.shape[-1]), np.float32)
        place = out[:, top * c : (top + high) * c, left * d : (left + wide) * d]
        place += part * (across[:, None] * along)[..., None]
    assert out is not None
    return out


# Latents outside are normalised, float32; frames are uint8 and float32.
@jax.jit
def _encode_chunk(vae: Autoencoder, frames: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    mean, _, cache = vae.encode_chunk(_to_floats(frames), cache)
    return _normalised(vae, mean), cache


@jax.jit
def _decode_chunk(vae: Autoencoder, latent: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    clip, cache = vae.decode_chunk(_raw(vae, latent), cache)
    return jnp.clip(clip, -1.0, 1.0), cache


@jax.jit
def _decode_whole(vae: WindowedAutoencoder, raw: jax.Array) -> jax.Array:
    return jnp.clip(vae.decode(raw), -1.0, 1.0)


@jax.jit
def _encode_local(vae: SplitAutoencoder, frames: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    features, cache = vae.encode_local(_to_floats(frames), cache)
    return features.astype(jnp.float32), cache


@jax.jit
def _encode_global(vae: SplitAutoencoder, features: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    mean, _, cache = vae.encode_global(features, cache)
    return _normalised(vae, mean), cache


@jax.jit
def _decode_global(vae: SplitAutoencoder, latent: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    features, cache = vae.decode_global(_raw(vae, latent), cache)
    return features.astype(jnp.float32), cache


@jax.jit
def _decode_local(vae: SplitAutoencoder, features: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    clip, cache = vae.decode_local(features, cache)
    return jnp.clip(clip, -1.0, 1.0), cache


def _to_floats(frames: jax.Array) -> jax.Array:
    return frames.astype(jnp.float32) / 127.5 - 1.0


def _normalised(vae: Autoencoder | SplitAutoencoder, mean: jax.Array) -> jax.Array:
    return (mean - jnp.array(vae.config.latent_mean)) / jnp.array(vae.config.latent_std)


def _raw(vae: Autoencoder | SplitAutoencoder, latent: jax.Array) -> jax.Array:
    return latent * jnp.array(vae.config.latent_std) + jnp.array(vae.config.latent_mean)
