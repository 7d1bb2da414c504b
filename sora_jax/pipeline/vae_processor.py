"""Sketches to canvases of latents, canvases to frames."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.models.tiles import Tiles, decode_stream, encode_stream
from sora_jax.pipeline.model import VideoModel
from sora_jax.tokens.canvas import Canvas, Sketch, all_noise_canvas, make_canvas, put_beside
from sora_jax.tokens.spans import CausalSpan, split_beside, split_into_spans

SEAM_FRAMES = (8, 3)  # over which a seam between two spans is blended: low, high spatial frequencies
LOW_PASS = 16  # pixels: what differs over larger places is a low frequency


class VaeProcessor(VideoModel):
    """Encodes sketches and decodes canvases, of any shapes."""

    tiles: Tiles | None = None  # how frames are cut for the autoencoder; None: as `tiles_of` says

    def strength_to_sigma(self, strength: np.ndarray, frame_tokens: int, latent_frames: int) -> np.ndarray:
        """The sigma from which pixels of a strength (share of the solver's steps, 0…1) start.

        Args:
          strength: of the whole canvas.
          frame_tokens: of a latent frame, in one of the `spatial_tiles`. More than a tile holds
            count as those of a frame that is cut.
          latent_frames: of the canvas.
        """
        max_tokens = self.bundle.limits.frame_tokens
        if max_tokens and strength.max() < 1:
            frame_tokens = min(frame_tokens, max_tokens)
        tokens = self.segment_tokens(frame_tokens, latent_frames)
        factor = self.bundle.shift_factor(tokens)
        sigmas = np.asarray(flow.shift(jnp.asarray(strength, jnp.float32), factor))
        return np.where(strength <= 0, 0.0, sigmas).astype(np.float32)

    def prepare_latents(self, sketch: Sketch) -> Canvas:
        """The canvas of a sketch, its conditioning encoded; frames are padded to whole cells at their edges."""
        T, Y, X, _ = sketch.frames.shape
        by_picture = self.sampling.from_picture and sketch.from_noise
        given = np.zeros(T, bool) if by_picture else sketch.conditioning_frames
        spans, later = split_into_spans(given, self.stride), list[CausalSpan]()
        takes_beside = self.bundle.dit is not None and getattr(self.dit.config, "conditional", False)
        if takes_beside and not given.all():
            whole, later = split_beside(given, self.stride)
            spans = [whole]
        if self.bundle.dit is not None and len(spans) == 1:  # whole patches in time too
            count, pt = len(spans[0].ends), self.dit.config.patch[0]
            spans = [CausalSpan(0, 1 + self.stride * (math.ceil(count / pt) * pt - 1), self.stride)]
        if sketch.all_noise or by_picture:
            canvas = all_noise_canvas(spans[0], self.cells(Y, X), self.vae.config.channels, sketch.fps)
            extra = self._picture_channels(sketch, spans[0]) if by_picture else None
            return dataclasses.replace(canvas, extra_channels=extra)
        padding = self._padding(Y, X)
        frames = np.pad(sketch.frames, [(0, 0), *padding, (0, 0)], mode="edge")
        strength = np.pad(sketch.strength, [(0, 0), *padding], mode="edge")

        def encode(span: CausalSpan, is_open: np.ndarray) -> np.ndarray:
            index = np.minimum(np.arange(span.begin, span.begin + span.frames), T - 1)
            known = np.flatnonzero(~is_open[index])
            needed = 0 if not known.size else 1 + -(-int(known[-1]) // self.stride)
            latent = np.zeros((len(span.ends), *self.cells(Y, X), self.vae.config.channels), np.float32)
            if needed:
                pieces = encode_stream(self.vae, frames[index[: 1 + self.stride * (needed - 1)]], self.tiles)
                latent[:needed] = np.concatenate(list(pieces))
            return latent

        if later:  # generated in the clip itself
            beside = [encode(span, np.zeros(T, bool)) for span in later]
            strength[given & (np.arange(T) >= later[0].begin)] = strength.max()
        open_frames = (strength == 1).all((1, 2))
        latents = [encode(span, open_frames) for span in spans]
        start = strength
        if self.bundle.dit is not None:
            _, _, *sides = self.spatial_tiles(self.cells(Y, X), from_noise=bool(strength.max() == 1))[0]
            tokens = math.prod(sides) // math.prod(self.dit.config.patch[1:])
            start = self.strength_to_sigma(strength, tokens, sum(len(span.ends) for span in spans))
        canvas = make_canvas(spans, latents, start, sketch.fps, self.vae.config.compression)
        return put_beside(canvas, later, beside) if later else canvas

    def _padding(self, height: int, width: int) -> list[tuple[int, int]]:
        """Pixels before and after each side of a frame that make it whole cells."""
        sides = zip(self.cells(height, width), self.vae.config.compression[1:], (height, width), strict=True)
        missing = [cells * pixels - have for cells, pixels, have in sides]
        return [(pixels // 2, pixels - pixels // 2) for pixels in missing]

    def _picture_channels(self, sketch: Sketch, span: CausalSpan) -> np.ndarray:
        """float32[t,y,x,stride + c]: a mask of the given frames, and a clip of them, gray for the others, encoded.

        Of a latent frame the mask has a channel for each video frame; of the first, which shows one, all are that
        one's (Wan team 2025, section 5.1).
        """
        T, Y, X, _ = sketch.frames.shape
        given, padding = sketch.conditioning_frames, self._padding(Y, X)
        gray = np.full(
            (*(n + sum(pad) for n, pad in zip((Y, X), padding, strict=True)), 3), 127.5, np.float32
        )
        index = np.minimum(np.arange(span.frames), T - 1)
        padded = lambda frame: np.pad(frame.astype(np.float32), [*padding, (0, 0)], mode="edge")
        clip = (padded(sketch.frames[i]) if given[i] else gray for i in index)
        latent = np.concatenate(list(encode_stream(self.vae, clip, self.tiles)))
        shown = np.repeat(given[index], [self.stride, *[1] * (len(index) - 1)])
        mask = shown.reshape(len(latent), 1, 1, self.stride).astype(np.float32)
        return np.concatenate([np.broadcast_to(mask, (*latent.shape[:3], self.stride)), latent], axis=-1)

    def decode_latents(self, canvas: Canvas, frames: int, height: int, width: int) -> np.ndarray:
        """The first frames of a canvas, and the middle of each: uint8[T,Y,X,3]."""
        out = np.zeros((frames, height, width, 3), np.uint8)
        for place, frame in enumerate(self.decode_frames(canvas, frames, height, width)):
            out[place] = to_bytes(frame)
        return out

    def decode_frames(
        self,
        canvas: Canvas,
        frames: int,
        height: int,
        width: int,
        generated: np.ndarray | None = None,
        latents: Iterable[np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """As `decode_latents`, frame by frame, in memory that doesn't grow with duration.

        Where spans overlap, the later one's frames are kept.

        Args:
          generated: bool[t], latent frames that were generated. Where their span overlaps the next one's begin, it
            shows that frame too: the difference of the two is blended into the generated frames before the seam,
            its low spatial frequencies over more frames than its high ones.
          latents: float32[y,x,c] each, in place of the canvas's own, read no sooner than they are decoded.

        Yields:
          float32[Y,X,3] in [-1, 1].
        """
        _, high, wide = self.vae.config.compression
        full = canvas.grid[1] * high, canvas.grid[2] * wide
        top, left = (full[0] - height) // 2, (full[1] - width) // 2
        spans = canvas.spans()
        begins = [min(int(canvas.ends[span.start]), frames) for span in spans]
        held = over = np.zeros((0, height, width, 3), np.float32)  # until the next seam is blended; after it
        open_from, rest = 0, iter(canvas.latent if latents is None else latents)
        for span, begin, end in zip(spans, begins, [*begins[1:], frames], strict=True):
            place = begin
            if begin >= frames:
                break
            coded = itertools.islice(rest, span.stop - span.start)
            for chunk in decode_stream(self.decoder, coded, self.tiles):
                chunk = chunk[: frames - place, top : top + height, left : left + width]
                if place == begin and len(over) and open_from < begin:
                    _blend_seam(held[-(begin - open_from) :], chunk[0] - over[0])
                own, over = np.split(chunk, [max(end - place, 0)])
                place += len(chunk)
                ready = max(len(held) + len(own) - max(SEAM_FRAMES), 0)
                old = min(ready, len(held))
                for frame in itertools.chain(held[:old], own[: ready - old]):
                    yield np.clip(frame, -1.0, 1.0)
                held = np.concatenate([held[old:], own[ready - old :]])
                over = over[:1].copy()
                chunk = own = frame = None  # they would keep the chunk while the next one is decoded
                if place >= frames or place > end:
                    break
            open_from = end
            if generated is not None and generated[span][-1]:
                conditioning = np.flatnonzero(~generated[span])
                open_from = int(canvas.ends[span][conditioning[-1]]) + 1 if conditioning.size else begin
        for frame in held:
            yield np.clip(frame, -1.0, 1.0)


def _blend_seam(before: np.ndarray, difference: np.ndarray) -> None:
    """Adds a growing share of `difference` [Y,X,3] to the last of the frames `before` [n,Y,X,3], in place."""
    Y, X, _ = difference.shape
    coarse = jax.image.resize(difference, (max(Y // LOW_PASS, 1), max(X // LOW_PASS, 1), 3), "linear")
    low = np.asarray(jax.image.resize(coarse, difference.shape, "linear"))
    for frames, part in zip(SEAM_FRAMES, (low, difference - low), strict=True):
        last = before[-frames:]
        rise = np.arange(1, len(last) + 1, dtype=np.float32) / (len(last) + 1)
        last += rise[:, None, None, None] * part


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8."""
    return np.round((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)
