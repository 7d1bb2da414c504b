"""The shape of LTX-Video's autoencoders, as a diffusers folder's `vae/config.json` gives it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sora_jax.config import component
from sora_jax.errors import UserError, nearest

Stride = tuple[int, int, int]  # of time, height and width
_STRIDES: dict[str, Stride] = {
    "conv": (2, 2, 2),
    "spatial": (1, 2, 2),
    "temporal": (2, 1, 1),
    "spatiotemporal": (2, 2, 2),
}
DECODE_TIMESTEP, DECODE_NOISE = 0.05, 0.025  # of the original's configurations; diffusers' defaults are 0
_OLD, _NEW = "LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"


class Down(NamedTuple):
    """A stage of the encoder: residual blocks, downsampling, and a residual block to another width."""

    width_in: int
    width_out: int
    blocks: int
    stride: Stride | None
    folded: bool  # whether cells are folded into channels, instead of a convolution with a stride
    widened: bool  # whether there is that last block


class Up(NamedTuple):
    """A stage of the decoder: a residual block to another width, upsampling and residual blocks."""

    width_in: int
    width_out: int
    blocks: int
    upsampled: bool
    residual: bool  # whether copies are beside the upsampling
    factor: int  # by which upsampling makes fewer channels
    noisy: bool


@dataclasses.dataclass(frozen=True)
class LTXVAEConfig:
    """Fields are called as in `vae/config.json`; the defaults are those of 0.9.0.

    Attributes:
      in_channels, out_channels: of pixels, 3.
      latent_channels: numbers a latent cell.
      block_out_channels, decoder_block_out_channels: channels of each stage, from fine to coarse; the encoder's of
        0.9.5 begin with those before its first stage.
      down_block_types: of each stage of the encoder, "LTXVideoDownBlock3D" or "LTXVideo095DownBlock3D".
      layers_per_block, decoder_layers_per_block: residual blocks of each stage, and of the coarsest, middle one.
      spatio_temporal_scaling, decoder_spatio_temporal_scaling: after which stages sides are halved, and time.
      decoder_inject_noise: where noise is added, of each stage and the middle one, from fine to coarse.
      downsample_type: of the stages of 0.9.5: "spatial", "temporal", "spatiotemporal" or "conv".
      upsample_residual, upsample_factor: whether copies are beside the upsampling, and by how much it makes fewer
        channels.
      timestep_conditioning: whether the decoder is told how noisy its latent is (from 0.9.1 on).
      patch_size: pixels along each side of a patch.
      patch_size_t: frames of a patch, 1.
      resnet_norm_eps: of the norms that have weights.
      scaling_factor: by which normalised latents are multiplied.
      encoder_causal, decoder_causal: whether no frame sees later ones; published decoders do.
      spatial_compression_ratio, temporal_compression_ratio: what stages and patches come to; None: not said.
      latents_mean, latents_std: per channel, from the file of weights; encode and decode leave them to the pipeline.
      dtype: of the arithmetic; parameters and norms stay float32.
      remat: of whole clips, for training: activations inside stages are computed again in the backward pass.
      decode_timestep, decode_noise: with `timestep_conditioning`, how noisy a latent is said to be, 0…1, and how much
        noise is added to it before it is decoded in windows of time. Not of the file: pipelines choose them.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = (_OLD,) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    decoder_layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    decoder_inject_noise: tuple[bool, ...] = (False,) * 5
    downsample_type: tuple[str, ...] = ("conv",) * 4
    upsample_residual: tuple[bool, ...] = (False,) * 4
    upsample_factor: tuple[int, ...] = (1,) * 4
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = False
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    remat: bool = dataclasses.field(default=False, repr=False)  # latents are named by the rest
    decode_timestep: float = DECODE_TIMESTEP
    decode_noise: float = DECODE_NOISE

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("latent_channels", "patch_size")}
        for name in (
            "block_out_channels",
            "decoder_block_out_channels",
            "upsample_factor",
            "layers_per_block",
            "decoder_layers_per_block",
        ):
            numbers |= {f"{name}[{i}]": value for i, value in enumerate(getattr(self, name))}
        for name, value in numbers.items():
            if value < 1:
                raise _refused(f"{name} is {value}, and must be at least 1")
        for name, wanted in {"in_channels": 3, "out_channels": 3, "patch_size_t": 1}.items():
            if getattr(self, name) != wanted:
                raise _refused(f"{name} is {getattr(self, name)}, and only {wanted} is supported")
        self._check_lengths()
        for name in self.down_block_types:
            if name not in (_OLD, _NEW):
                raise _refused(f"down_block_types has {name!r}, and the known ones are {_OLD!r} and {_NEW!r}")
        for name in self.downsample_type:
            if name not in _STRIDES:
                raise _refused(f"downsample_type has {name!r}, and the known ones are {', '.join(_STRIDES)}")
        self._check_widths()
        frames, side, _ = self.compression
        for name, wanted in {"temporal_compression_ratio": frames, "spatial_compression_ratio": side}.items():
            if getattr(self, name) not in (None, wanted):
                raise _refused(f"{name} is {getattr(self, name)}, and the other keys make it {wanted}")
        decoded = 2 ** sum(self.decoder_spatio_temporal_scaling)
        if (frames, side) != (decoded, decoded * self.patch_size):
            raise _refused(
                f"the encoder makes one latent cell of {frames} frames of {side}×{side} pixels, and the decoder "
                f"{decoded} of {decoded * self.patch_size}×{decoded * self.patch_size}"
            )

    def _check_lengths(self) -> None:
        downs = len(self.block_out_channels) - self._begins_with_width
        ups = len(self.decoder_block_out_channels)
        if min(downs, ups) < 1:
            raise _refused("block_out_channels and decoder_block_out_channels need one or more stages")
        for name, count in {
            "down_block_types": downs,
            "layers_per_block": downs + 1,
            "spatio_temporal_scaling": downs,
            "downsample_type": downs,
            "decoder_layers_per_block": ups + 1,
            "decoder_spatio_temporal_scaling": ups,
            "decoder_inject_noise": ups + 1,
            "upsample_residual": ups,
            "upsample_factor": ups,
        }.items():
            if len(getattr(self, name)) != count:
                raise _refused(f"{name} has {len(getattr(self, name))} values where {count} are needed")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise _refused(
                    f"{name} has {len(getattr(self, name))} values where {self.latent_channels} are needed"
                )

    def _check_widths(self) -> None:
        for down in self.downs:
            factor = math.prod(down.stride or (1,))
            if down.folded and (down.width_out % factor or down.width_in * factor % down.width_out):
                raise _refused(f"a width of {down.width_in} can't be folded into one of {down.width_out}")
            if not (down.folded or down.widened) and down.width_in != down.width_out:
                raise _refused(
                    f"no layer makes {down.width_out} channels of {down.width_in} in a stage of the encoder"
                )
        before = self.decoder_block_out_channels[-1]
        for width, factor, up in zip(
            self.decoder_block_out_channels[::-1], self.upsample_factor[::-1], self.ups, strict=True
        ):
            if before % factor or width % factor or (up.residual and 8 % factor):
                raise _refused(f"upsample_factor {factor} doesn't divide widths of {before} and {width}")
            if up.residual and up.upsampled and up.width_out * factor % 8:
                raise _refused(
                    f"a width of {up.width_out * factor} has no copies to be beside its upsampling"
                )
            if not up.upsampled and factor != 1:
                raise _refused(f"upsample_factor is {factor} where nothing is upsampled")
            if up.width_in != up.width_out and (self.timestep_conditioning or up.noisy or factor != 1):
                raise _refused(
                    f"a stage of the decoder from {up.width_in} to {up.width_out} channels can't have a timestep, "
                    "noise or an upsample_factor"
                )
            before = up.width_out

    @classmethod
    def read(cls, settings: Mapping[str, Any], dtype: str = "float32") -> LTXVAEConfig:
        """Of the contents of a diffusers `vae/config.json`.

        Raises:
          UserError: a key is not known, or its value can't be what it says.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {
            "dtype",
            "remat",
            "decode_timestep",
            "decode_noise",
        }
        kind = settings.get("_class_name", "AutoencoderKLLTXVideo")
        if kind != "AutoencoderKLLTXVideo":
            raise _refused(f"it is of an autoencoder of class {kind!r}, not AutoencoderKLLTXVideo")
        given = {key: value for key, value in settings.items() if key[:1] != "_"}
        if unknown := [key for key in given if key not in fields]:
            near = nearest(unknown[0], fields)
            hint = f" (did you mean {near}?)" if near else ""
            raise _refused(f"keys that this version doesn't know: {', '.join(unknown)}{hint}")
        return component(cls, given | {"dtype": dtype}, "vae")

    @property
    def channels(self) -> int:
        """Numbers a latent cell."""
        return self.latent_channels

    @property
    def latent_mean(self) -> tuple[float, ...]:
        return self.latents_mean or (0.0,)

    @property
    def latent_std(self) -> tuple[float, ...]:
        return tuple(value / self.scaling_factor for value in self.latents_std or (1.0,))

    @property
    def compression(self) -> Stride:
        """Pixels a latent cell spans: (frames, height, width)."""
        strides = [down.stride for down in self.downs if down.stride]
        frames, height, width = (
            (math.prod(sides) for sides in zip(*strides, strict=True)) if strides else (1, 1, 1)
        )
        return frames, height * self.patch_size, width * self.patch_size

    @property
    def downs(self) -> list[Down]:
        """The encoder's stages in order."""
        widths = self.block_out_channels
        if not self._begins_with_width:
            widths = (*widths, widths[-1])
        out = []
        for i, kind in enumerate(self.down_block_types):
            sizes = widths[i], widths[i + 1], self.layers_per_block[i]
            way = self.downsample_type[i] if kind == _NEW else "conv"
            stride = _STRIDES[way] if self.spatio_temporal_scaling[i] else None
            folded = way != "conv" and stride is not None
            out.append(Down(*sizes, stride, folded, kind == _OLD and sizes[0] != sizes[1]))
        return out

    @property
    def ups(self) -> list[Up]:
        """The decoder's stages in order, from coarse to fine."""
        backward = lambda values: values[::-1]
        widths, before = backward(self.decoder_block_out_channels), self.decoder_block_out_channels[-1]
        out = []
        for width, factor, blocks, upsampled, residual, noisy in zip(
            widths,
            backward(self.upsample_factor),
            backward(self.decoder_layers_per_block)[1:],
            backward(self.decoder_spatio_temporal_scaling),
            backward(self.upsample_residual),
            backward(self.decoder_inject_noise)[1:],
            strict=True,
        ):
            out.append(Up(before // factor, width // factor, blocks, upsampled, residual, factor, noisy))
            before = width // factor
        return out

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's stages, from coarse to fine."""
        return tuple(stage.width_out for stage in self.ups)

    @property
    def reach(self) -> int:
        """Latent frames that a decoder which isn't causal sees on either side: 24 in 0.9.0, 31 in 0.9.1, 22 later."""
        convolutions, rate = 1 + 2.0 * self.decoder_layers_per_block[-1], 1
        for up in self.ups:
            convolutions += (2 * (up.width_in != up.width_out) + up.upsampled) / rate
            rate *= 1 + up.upsampled
            convolutions += 2 * up.blocks / rate
        return math.ceil(convolutions + 1 / rate)

    @property
    def _begins_with_width(self) -> bool:
        return self.down_block_types[-1:] == (_NEW,)


def _refused(what: str) -> UserError:
    return UserError(
        f"The autoencoder's config.json can't be used: {what}. Check the file, or fetch it again."
    )


LTX_0_9_0 = LTXVAEConfig()
_LATER: dict[str, Any] = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
LTX_0_9_1 = LTXVAEConfig(
    **_LATER,
    decoder_layers_per_block=(5, 6, 7, 8),
    decoder_inject_noise=(True, True, True, False),
)
# Of 0.9.5 to 0.9.8.
LTX_0_9_5 = LTXVAEConfig(
    **_LATER,
    block_out_channels=(128, 256, 512, 1024, 2048),
    down_block_types=(_NEW,) * 4,
    layers_per_block=(4, 6, 6, 2, 2),
    spatio_temporal_scaling=(True,) * 4,
    downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    decoder_layers_per_block=(5, 5, 5, 5),
    decoder_inject_noise=(False,) * 4,
    spatial_compression_ratio=32,
    temporal_compression_ratio=8,
)
