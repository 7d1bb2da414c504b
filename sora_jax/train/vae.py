"""Training the autoencoder: crops of clips, reconstructed through a sampled latent."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from ml_collections import ConfigDict

from sora_jax.checkpoints.bundle import take_weights
from sora_jax.checkpoints.components import Autoencoder
from sora_jax.config import COUNT, FROM_ZERO, check_ranges, component
from sora_jax.data.data_config import DataConfig
from sora_jax.data.pipeline import clip_batches
from sora_jax.data.sources import announce, heldout_sources, make_sheet_sources, make_sources, summarise
from sora_jax.data.survey import Summaries
from sora_jax.distributed.mesh import Share
from sora_jax.errors import UserError
from sora_jax.media.clip import ClipSource
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video
from sora_jax.models.vae import VAE, VAEConfig, reconstruction_flops
from sora_jax.train.loop_config import LoopConfig

SHEET_CLIPS = 4  # of each data set


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """How the autoencoder is trained.

    Attributes:
      batch_size: clips of the global batch.
      shards: streams that the clips are dealt out to, see `data.shards`; a run's hosts must be a divisor of it.
      crop: (frames, height, width) of each.
      absolute, squared: weights of |error| and error², pixels in [-1, 1]: edges, and PSNR.
      kl: weight of the Kullback-Leibler divergence from the unit normal, mean over latent numbers, in nats.
      equivariance: weight of the same loss for clips half as large, decoded from the latent averaged over 2×2 cells:
        asks for latents without high frequencies of their own, which a diffusion transformer learns sooner
        (Skorokhodov et al. 2025, section 3.3; Kouzelis et al. 2025).
      latent_noise: largest standard deviation of noise that the decoder gets on a latent; each clip draws its own
        from zero to it, so that small errors of a transformer are forgiven.
    """

    batch_size: int = 8
    shards: int = 1
    crop: tuple[int, int, int] = (9, 64, 64)
    absolute: float = 1.0
    squared: float = 4.0
    kl: float = 1e-4
    equivariance: float = 0.0
    latent_noise: float = 0.0

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("absolute", "squared", "kl", "equivariance", "latent_noise"), FROM_ZERO)
        check_ranges(self, "loss", batch_size=COUNT, shards=COUNT, crop=COUNT, **weights)

    def of_error(self, error: jax.Array) -> jax.Array:
        """The reconstruction's loss, of decoded minus true pixels."""
        return self.absolute * jnp.mean(jnp.abs(error)) + self.squared * jnp.mean(jnp.square(error))


@dataclasses.dataclass(frozen=True)
class VAERun(LoopConfig):
    """Training an autoencoder.

    Attributes:
      init_from: a model, or a run, whose weights are the ones to begin with; empty: random ones.
      vae: shape of the autoencoder.
      loss: how it is trained.
      data: which clips, and of what shapes.
    """

    init_from: str = ""
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    loss: VAELossConfig = dataclasses.field(default_factory=VAELossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


class VAEObjective:
    """Reconstruction of crops of clips through a sampled latent (Kingma and Welling 2013)."""

    schema: ClassVar[type[LoopConfig]] = VAERun

    def __init__(self, config: ConfigDict, workdir: pathlib.Path) -> None:
        del workdir  # an autoencoder keeps nothing next to its checkpoints
        self.loss_config = component(VAELossConfig, config.loss, "loss")
        self.data_config = component(DataConfig, config.data, "data")
        self.sheets = bool(config.get("log", {}).get("sheet_every", 0))
        self.read_model(config)

    def read_model(self, config: ConfigDict) -> None:
        """Which autoencoder it is."""
        self.init_from = config.get("init_from", "")
        self.vae = component(VAEConfig, config.vae, "vae")
        if self.vae.kind == "pixels":
            raise UserError(
                "config.vae.kind='pixels' has no parameters to train: name its folder as autoencoder."
            )
        self.check_crop()

    def check_crop(self) -> None:
        """Raises UserError where crops can't be halved for the equivariance loss."""
        _, cell_height, cell_width = self.vae.compression
        _, height, width = self.loss_config.crop
        if self.loss_config.equivariance and (height % (2 * cell_height) or width % (2 * cell_width)):
            raise UserError(
                "loss.equivariance halves crops of an even number of latent cells: make the height and width of "
                f"loss.crop={self.loss_config.crop} multiples of {2 * cell_height} and {2 * cell_width}."
            )

    def init(self, key: jax.Array) -> Autoencoder:
        fresh = VAE(self.vae, rngs=nnx.Rngs(params=key))
        return take_weights(fresh, self.init_from, "vae") if self.init_from else fresh

    def loss(
        self, model: Autoencoder, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over pixels, and PSNR in dB of the sampled reconstruction."""
        weights = self.loss_config
        clip = batch["clip"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = model.encode(clip)
        latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        noisy = latent
        if weights.latent_noise:
            level_key, noise_key = jax.random.split(jax.random.fold_in(key, 1))
            level = jax.random.uniform(level_key, (len(clip), 1, 1, 1, 1), maxval=weights.latent_noise)
            noisy = latent + level * jax.random.normal(noise_key, latent.shape)
        error = model.decode(noisy) - clip
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = weights.of_error(error) + weights.kl * kl
        metrics = {"psnr": _psnr(error), "kl": kl, "absolute": jnp.mean(jnp.abs(error))}
        if weights.equivariance:
            small_error = model.decode(_halve(latent)) - _halve(clip)
            metrics["psnr_half"] = _psnr(small_error)
            loss += weights.equivariance * weights.of_error(small_error)
        return loss, metrics

    def shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of so many clips, as `loss` takes it."""
        return {"clip": jax.ShapeDtypeStruct((batch_size, *self.loss_config.crop, 3), np.uint8)}

    @functools.cached_property
    def sources(self) -> list[tuple[ClipSource, float]]:
        return make_sources(self.data_config, crop=self.loss_config.crop)

    def check(self) -> None:
        """Tries what the run will need, before any long work: says what the files are, and reads the sheets' clips.

        Raises:
          UserError: the data can't be used.
        """
        announce(self.sources)
        if self.sheets:
            _ = self.sheet_clips

    def data(self, config: ConfigDict, share: Share) -> grain.IterDataset:
        self.check()
        return self._batches(self.sources, share)

    def heldout_data(self, share: Share, batches: int) -> list[dict[str, np.ndarray]]:
        """Crops of clips of the validation split."""
        clips = batches * self.loss_config.batch_size
        sources = heldout_sources(self.data_config, clips, self.loss_config.crop)
        return list(itertools.islice(self._batches(sources, share), batches)) if sources else []

    def _batches(
        self, sources: list[tuple[ClipSource, float]], share: Share
    ) -> grain.IterDataset[dict[str, np.ndarray]]:
        loss, seed = self.loss_config, self.data_config.seed
        return clip_batches(sources, loss.batch_size, loss.crop, seed, loss.shards, share)

    def flops(self, batch: dict[str, np.ndarray]) -> float:
        return 3 * reconstruction_flops(self.vae, *batch["clip"].shape[:4])

    def tokens(self, batch: dict[str, np.ndarray]) -> tuple[int, int]:
        """Latent cells: crops have no padding."""
        B, T, Y, X, _ = batch["clip"].shape
        time, height, width = self.vae.compression
        cells = B * (1 + (T - 1) // time) * (Y // height) * (X // width)
        return cells, cells

    def data_summary(self) -> Summaries | None:
        """What the files among the data sets are, and what of them could not be read until now."""
        return summarise(self.sources)

    @functools.cached_property
    def sheet_clips(self) -> list[tuple[Video, str]]:
        """Crops that sheets show, with what they are: held out of training, or not where too little is there."""
        T, Y, X = self.loss_config.crop
        clips = []
        for source, held_out in make_sheet_sources(self.data_config, SHEET_CLIPS, self.loss_config.crop):
            for index in range(SHEET_CLIPS):
                video = source[index].video
                label = "true" if held_out else "true (a training clip)"
                clips.append((Video(video.frames[:T, :Y, :X], video.fps), label))
        return clips

    def sample_sheet(self, model: Autoencoder, step: int) -> PIL.Image.Image:
        """Crops that training has not seen, where there are such, above their reconstructions."""
        videos, labels = [], []
        for video, label in self.sheet_clips:
            clip = jnp.asarray(video.frames[None], jnp.float32) / 127.5 - 1.0
            pixels = _reconstruct(model, clip)[0] * 127.5 + 127.5
            back = np.asarray(jnp.clip(pixels, 0, 255).round(), np.uint8)
            psnr = 10 * np.log10(255.0**2 / np.mean(np.square(back.astype(np.float32) - video.frames)))
            videos += [video, Video(back, video.fps)]
            labels += [label, f"{psnr:.1f} dB"]
        return contact_sheet(videos, labels, columns=2)


def _psnr(error: jax.Array) -> jax.Array:
    """In dB, of pixels in [-1, 1]."""
    return 10 * jnp.log10(4.0 / jnp.mean(jnp.square(error)))


def _halve(x_btyxc: jax.Array) -> jax.Array:
    """Means over 2×2 places."""
    B, T, Y, X, C = x_btyxc.shape
    return x_btyxc.reshape(B, T, Y // 2, 2, X // 2, 2, C).mean((3, 5))


@jax.jit
def _reconstruct(model: Autoencoder, clip: jax.Array) -> jax.Array:
    return model.decode(model.encode(clip)[0])
