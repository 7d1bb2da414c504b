"""The shape of Wan's video autoencoders, as a diffusers folder's `vae/config.json` gives it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sora_jax.config import component
from sora_jax.errors import UserError, nearest

# Keys that say nothing of the shape: dropout is of training alone, and diffusers reads no `clip_output`.
IGNORED = ("clip_output", "dropout")


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Fields are called as in `vae/config.json`; the defaults are Wan 2.1's.

    Attributes:
      base_dim, decoder_base_dim: channels of the finest stage; the decoder's own, where they differ.
      z_dim: numbers a latent cell.
      dim_mult: channels of each stage, from fine to coarse, in `base_dim`s; a stage has half the sides of the one
        before.
      num_res_blocks: of each stage of the encoder; the decoder's have one more.
      attn_scales: scales (1, 0.5, …) at which the encoder's stages have attention too; none in the published models.
        Tiles then aren't exact.
      temperal_downsample: after which stages time is halved too (the original's spelling).
      latents_mean, latents_std: per channel; encode and decode leave them to the pipeline.
      is_residual: whether stages have a shortcut of averages and copies (Wan 2.2).
      in_channels, out_channels: of a patch of pixels, 3·patch_size².
      patch_size: pixels along each side of a patch; None: one.
      scale_factor_temporal, scale_factor_spatial: what the stages and patches come to.
      dtype: of the arithmetic; parameters, norms and softmax stay float32.
      remat: of whole clips, for training: activations inside blocks are computed again in the backward pass.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    remat: bool = dataclasses.field(default=False, repr=False)  # latents are named by the rest

    def __post_init__(self) -> None:
        for name in ("base_dim", "z_dim", "num_res_blocks", "patch_size", "decoder_base_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise _refused(f"{name} is {value}, and must be at least 1")
        if not self.dim_mult or min(self.dim_mult) < 1:
            raise _refused(f"dim_mult is {list(self.dim_mult)}, and needs one or more numbers from 1")
        wanted = {
            "temperal_downsample": len(self.dim_mult) - 1,
            "latents_mean": self.z_dim,
            "latents_std": self.z_dim,
        }
        for name, count in wanted.items():
            if len(getattr(self, name)) != count:
                raise _refused(f"{name} has {len(getattr(self, name))} values where {count} are needed")
        pixels = 3 * (self.patch_size or 1) ** 2
        for name, value in {
            "in_channels": pixels,
            "out_channels": pixels,
            "scale_factor_temporal": self.compression[0],
            "scale_factor_spatial": self.compression[1],
        }.items():
            if getattr(self, name) != value:
                raise _refused(f"{name} is {getattr(self, name)}, and the other keys make it {value}")
        down, up = (*self.strides, (1, 1, 1)), self.strides[::-1]
        fitting = [i * math.prod(stride) % o == 0 for i, o, stride in _steps(self.encoder_widths, down)]
        fitting += [o * math.prod(stride) % i == 0 for i, o, stride in _steps(self.decoder_widths, up)]
        if self.is_residual and not all(fitting):
            raise _refused(
                f"widths {list(self.encoder_widths)} and {list(self.decoder_widths)} don't divide for the shortcuts"
            )

    @classmethod
    def read(cls, settings: Mapping[str, Any], dtype: str = "float32") -> WanVAEConfig:
        """Of the contents of a diffusers `vae/config.json`.

        Raises:
          UserError: a key is not known, or its value can't be what it says.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"dtype", "remat"}
        if (kind := settings.get("_class_name", "AutoencoderKLWan")) != "AutoencoderKLWan":
            raise _refused(f"it is of an autoencoder of class {kind!r}, not AutoencoderKLWan")
        given = {key: value for key, value in settings.items() if key[:1] != "_" and key not in IGNORED}
        if unknown := [key for key in given if key not in fields]:
            near = nearest(unknown[0], fields)
            hint = f" (did you mean {near}?)" if near else ""
            raise _refused(f"keys that this version doesn't know: {', '.join(unknown)}{hint}")
        return component(cls, given | {"dtype": dtype}, "vae")

    @property
    def channels(self) -> int:
        """Numbers a latent cell."""
        return self.z_dim

    @property
    def latent_mean(self) -> tuple[float, ...]:
        return self.latents_mean

    @property
    def latent_std(self) -> tuple[float, ...]:
        return self.latents_std

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """After each stage of the encoder but the last: (time, height, width)."""
        return tuple((2 if in_time else 1, 2, 2) for in_time in self.temperal_downsample)

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels a latent cell spans: (frames, height, width)."""
        side = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        return 2 ** sum(self.temperal_downsample), side, side

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels where the encoder begins, then those of each stage."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels where the decoder begins, then those of each stage, from coarse to fine."""
        base = self.decoder_base_dim or self.base_dim
        return tuple(base * factor for factor in (self.dim_mult[-1], *self.dim_mult[::-1]))


def _steps(
    widths: tuple[int, ...], strides: tuple[tuple[int, int, int], ...]
) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
    """(width in, width out, stride) of each stage that has a stride."""
    return zip(widths, widths[1:], strides)


def _refused(what: str) -> UserError:
    return UserError(
        f"The autoencoder's config.json can't be used: {what}. Check the file, or fetch it again."
    )


WAN_2_1 = WanVAEConfig()
WAN_2_2 = WanVAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    latents_mean=(
        *(
            -0.2289,
            -0.0052,
            -0.1323,
            -0.2339,
            -0.2799,
            0.0174,
            0.1838,
            0.1557,
            -0.1382,
            0.0542,
            0.2813,
            0.0891,
        ),
        *(
            0.1570,
            -0.0098,
            0.0375,
            -0.1825,
            -0.2246,
            -0.1207,
            -0.0698,
            0.5109,
            0.2665,
            -0.2108,
            -0.2158,
            0.2502,
        ),
        *(
            -0.2055,
            -0.0322,
            0.1109,
            0.1567,
            -0.0729,
            0.0899,
            -0.2799,
            -0.1230,
            -0.0313,
            -0.1649,
            0.0117,
            0.0723,
        ),
        *(
            -0.2839,
            -0.2083,
            -0.0520,
            0.3748,
            0.0152,
            0.1957,
            0.1433,
            -0.2944,
            0.3573,
            -0.0548,
            -0.1681,
            -0.0667,
        ),
    ),
    latents_std=(
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)
