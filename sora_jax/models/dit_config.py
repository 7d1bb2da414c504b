"""The transformer's shape and arithmetic: its configuration, and the operations that a forward pass takes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

import jax

from sora_jax.distributed.mesh import HEADS
from sora_jax.errors import UserError
from sora_jax.models.attention.blocks import CHECKPOINT
from sora_jax.tokens.patches import CoordinateMode

Backend: TypeAlias = Literal["auto", "reference", "cpu", "gpu", "tpu"]
"""Of `attention.dispatch.BACKENDS`, or the best for the platform."""

# Width, layers, heads: S to XL are DiT's own (Peebles and Xie 2022, table 1), Ti is ViT's; Pico and Nano
# are for demonstrations, and for what two cores can train.
SIZES = {
    "Pico": (128, 4, 4),
    "Nano": (192, 6, 3),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "3B": (2304, 36, 18),
    "7B": (3072, 48, 24),
    "14B": (4096, 46, 32),
}

POLICIES = {
    "all": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(CHECKPOINT),
    ),
    "none": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer.

    Attributes:
      size: a name of `SIZES`, or "" to take width, layers and heads as given.
      width, layers, heads: of the residual stream, in all, and of a layer's attention, where `size` is "".
      mlp_ratio: hidden width of an MLP, in widths.
      patch: latent cells a token spans in (time, height, width).
      channels: of the latent.
      text_width: of the text encoder's states.
      coords: how coordinates enter RoPE: "fractional" (centred, in short sides of the frame), "absolute" (in patches
        from the first corner) or "normalized" (centred, each side in its own length); see `patches.coordinates`.
      rope_periods: (longest, shortest) period for time in seconds and for space in units of `coords`.
      absolute: whether Fourier features of the coordinates, and of how much of time and space a token covers, are
        added to the patches too. With RoPE alone a token has its position only relative to its caption, whose tokens
        are at the frame's centre at time 0, and nothing says the frame rate and resolution.
      caption: how a caption's states reach the tokens (Peebles and Xie 2023, section 3.2): as "tokens" of the sequence
        (in-context conditioning), by a "cross"-attention layer in each block, or only "pooled", as their mean.
      pooled_text: whether the mean of a caption's states joins σ in its condition (as in Esser et al. 2024, figure 2),
        whichever way its tokens take: a short path from a caption to every token.
      reference_frames: whether a token gets the conditioning patches at its own (y, x) before and after it
        (`patches.reference_patches`), next to attention: a short path to keep what doesn't change.
      dtype: of the arithmetic; parameters, norms, softmax and the residual stream's sums stay float32. Products of
        "float32" are exact on CPUs; accelerators round their factors, to bfloat16 (TPUs) or TF32 (GPUs), except
        those of σ and conditions.
      remat: what is saved of a layer for the backward pass: "all", "dots" (matrix products, and attention's result) or
        "none" (recompute).
      attention: a backend of `models.attention.dispatch`; see `choose` there.
      sequence: attention of sequences that are split over devices along `sequence`: "heads" (all-to-all, then a kernel)
        or "ring" (keys and values are exchanged); `attention.ring` says which when.
      predict: what the last layer gives: the "velocity", or the "clean" patches, of which the velocity is computed
        (Li and He 2025): data lie on fewer dimensions than noise does.
      flow_map: whether it knows to which σ a step goes, and gives the mean velocity on the way there, so that few steps
        do (flow maps, Boffi et al. 2024; learned by `train.distill`).
    """

    size: str = "Ti"
    width: int = 0
    layers: int = 0
    heads: int = 0
    mlp_ratio: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 16
    text_width: int = 384
    coords: CoordinateMode = "fractional"
    rope_periods: tuple[tuple[float, float], tuple[float, float]] = ((64.0, 0.25), (8.0, 0.125))
    absolute: bool = False
    caption: Literal["tokens", "cross", "pooled"] = "tokens"
    pooled_text: bool = False
    reference_frames: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    remat: Literal["all", "dots", "none"] = "all"
    attention: Backend = "auto"
    sequence: Literal["heads", "ring"] = "heads"
    predict: Literal["velocity", "clean"] = "velocity"
    flow_map: bool = False

    def __post_init__(self) -> None:
        if self.size:
            if self.size not in SIZES:
                raise UserError(f"No DiT size is called {self.size!r}: choose one of {', '.join(SIZES)}.")
            for name, value in zip(("width", "layers", "heads"), SIZES[self.size], strict=True):
                if getattr(self, name) not in (0, value):
                    raise UserError(
                        f"dit.{name} can't be set together with dit.size={self.size!r}: set dit.size='' first."
                    )
                object.__setattr__(self, name, value)
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"dit.{name}={getattr(self, name)} must be at least 1: set it, or set dit.size."
                )
        head_width = self.width // self.heads
        # RoPE rotates pairs of a head's numbers: at least one pair each for time, y and x.
        if self.width % self.heads or head_width % 2 or head_width < 6:
            raise UserError(
                f"dit.heads={self.heads} must divide dit.width={self.width} into heads of an even width, 6 or more."
            )
        for name, choices in (
            ("remat", POLICIES),
            ("attention", get_args(Backend)),
            ("coords", get_args(CoordinateMode)),
            ("sequence", ("heads", "ring")),
            ("predict", ("velocity", "clean")),
            ("caption", ("tokens", "cross", "pooled")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"dit.{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}."
                )
        if self.caption == "pooled" and not self.pooled_text:
            raise UserError(
                "With dit.caption='pooled' a caption has no other way to the tokens: set dit.pooled_text=True too."
            )

    def text_positions(self, text_len: int) -> int:
        """Of so many text positions, how many are in the sequence that self-attention sees: all, or none."""
        return text_len if self.caption == "tokens" else 0

    @property
    def heads_over(self) -> tuple[str, ...]:
        """The axes of a mesh that must divide the heads, together."""
        return ("tensor",) if self.sequence == "ring" else HEADS

    @property
    def stream_dtype(self) -> str:
        """Of the residual stream."""
        return "float32"

    @property
    def hidden(self) -> int:
        """Width of an MLP."""
        return self.mlp_ratio * self.width

    @property
    def patch_width(self) -> int:
        """P, numbers a token holds."""
        time, height, width = self.patch
        return time * height * width * self.channels

    @property
    def extra_channels(self) -> int:
        """Channels that are given beside the latent's: none."""
        return 0

    @property
    def extra_width(self) -> int:
        """Numbers of a token beside those it holds: none."""
        return 0

    @property
    def picture_width(self) -> int:
        """Width of pictures' states: it takes none."""
        return 0


def forward_flops(
    config: DiTConfig, tokens: float, attention_pairs: float, words: float = 0, word_pairs: float = 0
) -> float:
    """Floating-point operations (2 per multiply-add) of one forward pass, without padding.

    Args:
      config: the transformer.
      tokens: real tokens of the sequences: video, and text where it is among them.
      attention_pairs: pairs of tokens within segments, Σ n² over segments.
      words: text tokens that cross-attention sees, where there is one.
      word_pairs: pairs of a token and a text token of its segment there.
    """
    D = config.width
    per_token = 2 * D * D * (4 + 2 * config.mlp_ratio) * config.layers + 4 * D * config.patch_width
    cross = 4 * D * D * (tokens + words) * config.layers if config.caption == "cross" else 0
    return tokens * per_token + cross + 4.0 * (attention_pairs + word_pairs) * D * config.layers


def published_flops(
    config: Any, tokens: float, attention_pairs: float, words: float = 0, word_pairs: float = 0
) -> float:
    """As `forward_flops`, of Wan's and LTX-Video's transformers: captions are projected, and reached across."""
    D, L = config.width, config.layers
    per_token = L * (6 * D * D + 2 * D * config.hidden) + (2 * config.patch_width + config.extra_width) * D
    per_word = L * 2 * D * D + config.text_width * D + D * D
    return 2 * (tokens * per_token + words * per_word + 2 * L * D * (attention_pairs + word_pairs))


def segment_flops(config: DiTConfig, tokens: float, words: float) -> float:
    """`forward_flops` of one segment of so many video and text tokens; of each, where they are arrays."""
    inside = tokens + (words if config.caption == "tokens" else 0)
    beside = words if config.caption == "cross" else 0
    return forward_flops(config, inside, inside**2, beside, tokens * beside)
