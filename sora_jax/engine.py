"""What every ability stands on: sketches to canvases, canvases filled by the one sampler, canvases to frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.diffusion.canvas import (
    GROUP,
    Canvas,
    Sketch,
    Stream,
    check_groups,
    lay_streams,
    make_canvas,
)
from sora_jax.filling import Progress, Task, fill, transformer, window
from sora_jax.models.bundle import Bundle
from sora_jax.models.dit import DiT
from sora_jax.models.text import TextEncoder, load_text_encoder
from sora_jax.models.vae import VAE

CHUNK = 4  # latent frames that the autoencoder codes at a time
SEAMS = (8, 3)  # video frames over which a seam between two streams is taken up: of shades, of things
SHADE = 16  # pixels: what differs over larger places is a shade


class Engine:
    """A loaded model. One instance serves any number of canvases, of any shapes."""

    def __init__(self, bundle: Bundle, text: TextEncoder | None = None) -> None:
        check_groups(bundle.vae.config.compression[0])
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
        return transformer(self.bundle)

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
            math.ceil(side / (multiple := math.lcm(pixels * by, grid))) * multiple // pixels
            for side, pixels, by, grid in zip(
                (height, width), space, patch[1:], self.bundle.limits.grid, strict=True
            )
        )
        return high, wide

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame."""
        return math.prod(self.cells(height, width)) // math.prod(self.dit.config.patch[1:])

    def window(self, frame_tokens: int) -> int:
        """The most latent frames that the model sees at once, of so many tokens each; 0 if not even one."""
        return window(self.bundle, frame_tokens)

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

    def decode_floats(
        self,
        canvas: Canvas,
        frames: int,
        height: int,
        width: int,
        painted: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `decode`, in [-1, 1]: float32[T,Y,X,3]. Where streams overlap, the later one's frames are kept.

        Args:
          painted: bool[t], latent frames that were painted. Where their stream reaches over the next one's begin,
            it shows that frame too: what the two differ by is taken up over the painted frames before the seam,
            little by little where it is a shade, shortly before where it is a thing in another place.
        """
        _, high, wide = self.vae.config.compression
        full = canvas.grid[1] * high, canvas.grid[2] * wide
        top, left = (full[0] - height) // 2, (full[1] - width) // 2
        out = np.zeros((frames, height, width, 3), np.float32)
        end = open_from = 0  # of the stream before: behind its last frame, and its last painted frames' first
        for stream in canvas.streams():
            begin = int(canvas.ends[stream.start])
            clip = self._decode_stream(canvas.latent[stream])[: max(frames - begin, 0)]
            clip = clip[:, top : top + height, left : left + width]
            if begin < min(end, frames) and open_from < begin:
                _take_up(out[open_from:begin], clip[0] - out[begin])
            out[begin : begin + len(clip)] = clip
            end, open_from = begin + len(clip), begin + len(clip)
            if painted is not None and painted[stream][-1]:
                last_given = np.flatnonzero(~painted[stream])
                open_from = int(canvas.ends[stream][last_given[-1]]) + 1 if last_given.size else begin
        return np.clip(out, -1.0, 1.0)

    def fill(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[Canvas]:
        """See `filling.fill`."""
        return fill(self.bundle, self.text, tasks, progress)

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


def _take_up(before: np.ndarray, difference: np.ndarray) -> None:
    """Adds a growing share of `difference` [Y,X,3] to the last of the frames `before` [n,Y,X,3], in place."""
    Y, X, _ = difference.shape
    coarse = jax.image.resize(difference, (max(Y // SHADE, 1), max(X // SHADE, 1), 3), "linear")
    shade = np.asarray(jax.image.resize(coarse, difference.shape, "linear"))
    for frames, part in zip(SEAMS, (shade, difference - shade), strict=True):
        last = before[-frames:]
        rise = np.arange(1, len(last) + 1, dtype=np.float32) / (len(last) + 1)
        last += rise[:, None, None, None] * part


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8."""
    return np.round((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)


@jax.jit
def _encode_piece(vae: VAE, frames: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    mean, _, past = vae.encode_chunk(frames.astype(jnp.float32) / 127.5 - 1.0, past)
    return (mean - jnp.array(vae.config.latent_mean)) / jnp.array(vae.config.latent_std), past


@jax.jit
def _decode_piece(vae: VAE, latent: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    raw = latent * jnp.array(vae.config.latent_std) + jnp.array(vae.config.latent_mean)
    clip, past = vae.decode_chunk(raw, past)
    return jnp.clip(clip, -1.0, 1.0), past
