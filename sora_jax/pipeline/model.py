"""A model that is loaded when it is first needed, and what it can hold: checked before memory is taken."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sora_jax.backend import cache_home
from sora_jax.checkpoints.components import Autoencoder, Bundle, Sampling, Transformer
from sora_jax.errors import UserError
from sora_jax.models.text import TextEncoder, load_text_encoder
from sora_jax.pipeline.budget import LIMIT_FPS, LIMIT_SECONDS, VideoCost, check_frames, check_pixels
from sora_jax.pipeline.settings import Settings
from sora_jax.tokens.canvas import Sketch, tile_boxes

ONLY_PICTURES = (
    "This model makes a video from a picture, its first frame (and if you like another, its last): use animate, or "
    "another model."
)
STATES = "SORA_JAX_TEXT_STATES"  # environment variable: the folder of prompts' states; empty: none are kept


def _kept_states() -> pathlib.Path | None:
    """Where states of prompts are kept whose encoder is read from its files each time; None where that can't be."""
    name = os.environ.get(STATES, str(cache_home() / "text_states"))
    try:
        if name:
            (folder := pathlib.Path(name)).mkdir(parents=True, exist_ok=True)
            return folder if os.access(folder, os.W_OK) else None
    except OSError:
        pass
    return None


class VideoModel:
    """A bundle with its text encoder, and which shapes it can hold.

    Args:
      bundle: the model, or a function that loads it, called when it is first needed: what is wrong with a request is
        then found before.
      text_encoder: None is the bundle's own.
      sampling: how it is sampled, where that is known before it is loaded; None: as the bundle says.
    """

    def __init__(
        self,
        bundle: Bundle | Callable[[], Bundle],
        text_encoder: TextEncoder | None = None,
        sampling: Sampling | None = None,
    ):
        self._load = bundle if callable(bundle) else lambda: bundle
        self._text_encoder, self._sampling = text_encoder, sampling

    @functools.cached_property
    def bundle(self) -> Bundle:
        return self._load()

    @property
    def sampling(self) -> Sampling:
        return self._sampling or self.bundle.sampling

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the settings those that differ for this model where nothing is asked for."""
        names = [field.name for field in dataclasses.fields(Settings)]
        # A few-step model's own sigmas are for its own number of steps: `Bundle.fixed_sigmas`.
        own = {
            name: value for name, value in vars(self.sampling).items() if name in names and name != "sigmas"
        }
        own |= {"guidance": 1.0} if self.sampling.distilled else {}
        return {name: value for name, value in own.items() if value != getattr(Settings, name)}

    def settings_defaults(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """`defaults` but for what these decide: a guidance that is asked for holds at all noise levels."""
        left_out = {"low_noise_guidance"} if "guidance" in fields else set()
        return {name: value for name, value in self.defaults.items() if name not in left_out}

    @property
    def shape_defaults(self) -> dict[str, Any]:
        """Of the shape of a video of a prompt what differs for this model where nothing is asked for."""
        names = ("resolution", "aspect", "fps", "duration")
        return {name: value for name in names if (value := getattr(self.sampling, name))}

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def vae(self) -> Autoencoder:
        return self.bundle.vae

    @property
    def decoder(self) -> Autoencoder:
        """What decodes: the autoencoder, where no other decoder is in its place."""
        return self.vae if self.bundle.decoder is None else self.bundle.decoder

    @property
    def stride(self) -> int:
        """Video frames of a latent frame, but for the first of what is encoded together, which shows one."""
        return self.vae.config.compression[0]

    @property
    def dit(self) -> Transformer:
        """The transformer.

        Raises:
          UserError: the model is an autoencoder only.
        """
        if self.bundle.dit is None:
            raise UserError(
                f"The model {self.name!r} is an autoencoder only: it can reconstruct, but not generate."
            )
        return self.bundle.dit

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers the transformer has."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.dit))

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded when first needed."""
        if self._text_encoder is None:
            self._text_encoder = load_text_encoder(self.bundle.text, kept_states=_kept_states())
        return self._text_encoder

    def encode_pictures(self, sketches: Sequence[Sketch]) -> list[np.ndarray | None]:
        """The image encoder's states float32[i,V] of the frames that are given in each; None: the model takes none."""
        if self.bundle.image_encoder is None:
            return [None] * len(sketches)
        given = [list(sketch.frames[sketch.conditioning_frames]) for sketch in sketches]
        states = iter(self.bundle.image_encoder([picture for own in given for picture in own]))
        return [np.concatenate([next(states) for _ in own]) for own in given]

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latent that holds frames of a size; they are cropped when decoded."""
        patch = self.bundle.dit.config.patch if self.bundle.dit else (1, 1, 1)
        _, *space = self.vae.config.compression
        high, wide = (
            math.ceil(side / (multiple := math.lcm(pixels * p, grid))) * multiple // pixels
            for side, pixels, p, grid in zip(
                (height, width), space, patch[1:], self.bundle.limits.grid, strict=True
            )
        )
        return high, wide

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of one latent frame."""
        return math.prod(self.cells(height, width)) // math.prod(self.dit.config.patch[1:])

    def max_latent_frames(self, frame_tokens: int) -> int:
        """The most latent frames, of so many tokens each, that the model sees at once; 0 if not even one."""
        limits, pt = self.bundle.limits, self.dit.config.patch[0]
        fit = limits.tokens // max(frame_tokens, 1) * pt
        return min(fit, limits.latent_frames or fit)

    def spatial_tiles(self, cells: tuple[int, int], from_noise: bool) -> list[tuple[int, int, int, int]]:
        """Tiles (top, left, height, width), in cells, of a frame of `cells` (y, x): each is a segment of its own.

        Args:
          from_noise: whether some of the canvas is generated from noise alone. Then a frame is one segment, as its
            parts would not know what the others show; else a frame larger than training's is cut.
        """
        patch, max_tokens = self.dit.config.patch, self.bundle.limits.frame_tokens
        if max_tokens and not from_noise and math.prod(cells) // math.prod(patch[1:]) > max_tokens:
            return tile_boxes(cells, patch, max_tokens)
        return [(0, 0, *cells)]

    def segment_tokens(self, frame_tokens: int, latent_frames: int) -> int:
        """Tokens of the first segment of a canvas, by which its sigmas are shifted (`flow.shift_factor`).

        Args:
          frame_tokens: of a latent frame, in one of the `spatial_tiles`.
          latent_frames: of the canvas.
        """
        frames = min(latent_frames, self.max_latent_frames(frame_tokens))
        return frame_tokens * math.ceil(frames / self.dit.config.patch[0])

    def holds(self, size: tuple[int, int], frames: int = 2) -> bool:
        """Whether the model sees so many frames (or two latent ones) of a size, (height, width), at once."""
        return self.max_latent_frames(self.frame_tokens(*size)) >= min(frames, 2)

    def cost(self, frames: int, size: tuple[int, int], settings: Settings) -> VideoCost:
        """What a video takes, to be checked against limits before it is made."""
        tokens, max_tokens = self.frame_tokens(*size), self.bundle.limits.frame_tokens
        fits = self.max_latent_frames
        at_once = fits(tokens) or fits(min(max_tokens or tokens, tokens)) or 1
        return VideoCost(
            frames,
            *size,
            frame_tokens=tokens,
            latent_frames=1 + -(-(frames - 1) // self.stride),
            max_latent_frames=at_once,
            steps=settings.steps,
            passes=settings.as_guidance.passes() * (2 if settings.solver == "heun" else 1),
            parameters=self.parameters,
            anchor=settings.anchor,
        )

    def max_frames(self, settings: Settings) -> int:
        """The most frames of a video, and of all videos of a batch together."""
        return settings.max_frames or round(LIMIT_SECONDS * (self.bundle.limits.fps or LIMIT_FPS))

    def check_limits(
        self, frames: int, size: tuple[int, int], fps: float, settings: Settings, held: bool = True
    ) -> None:
        """To be called before memory is taken for a video's frames.

        Args:
          held: whether its frames are all in memory at once.

        Raises:
          UserError: the video has more frames than `Settings.max_frames`, or they don't fit.
        """
        cost = self.cost(frames, size, settings)
        check_frames(cost, self.max_frames(settings), jax.default_backend(), fps)
        if held:
            check_pixels(cost)
