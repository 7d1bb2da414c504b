"""Training on top of an open model's autoencoder: its decoder, or all of it, on your videos.

The latents of the decoder that is trained stay those that the model's transformer knows, as long as the encoder stays
as it is (`optim.trainable`).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sora_jax.checkpoints.base_model import check_base
from sora_jax.checkpoints.components import Autoencoder
from sora_jax.checkpoints.pretrained import kind_of, load_vae, pretrained_folder
from sora_jax.config import component
from sora_jax.data.data_config import DataConfig
from sora_jax.distributed.hosts import barrier
from sora_jax.errors import UserError
from sora_jax.models.conv import check_clip
from sora_jax.train.loop_config import LoopConfig
from sora_jax.train.vae import VAELossConfig, VAEObjective


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder computes; its shape is the model's.

    Attributes:
      dtype: of the arithmetic; parameters, norms and the loss are float32.
      remat: whether activations inside blocks are computed again in the backward pass instead of kept.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    remat: bool = True


@dataclasses.dataclass(frozen=True)
class FinetuneVAERun(LoopConfig):
    """Training on top of the autoencoder of a diffusers folder.

    Attributes:
      pretrained: the folder, or `hf:OWNER/NAME`. It may have moved when a run goes on.
      autoencoder: how it computes.
      loss: how it is trained.
      data: which clips, and of what shapes.
    """

    pretrained: str = ""
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    loss: VAELossConfig = dataclasses.field(default_factory=VAELossConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


class FinetuneVAEObjective(VAEObjective):
    """Reconstruction of crops of clips, as `VAEObjective`. The folder is read when it is first needed."""

    schema: ClassVar[type[LoopConfig]] = FinetuneVAERun

    def __init__(self, config: ConfigDict, workdir: pathlib.Path) -> None:
        super().__init__(config, workdir)
        self.workdir = workdir

    def read_model(self, config: ConfigDict) -> None:
        self.pretrained = config.pretrained
        self.computing = component(AutoencoderConfig, config.autoencoder, "autoencoder")

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        if not self.pretrained:
            raise UserError(
                "config.pretrained is empty: name a diffusers folder, --config.pretrained=path/to/FOLDER, or "
                "hf:OWNER/NAME."
            )
        return pretrained_folder(self.pretrained)

    @functools.cached_property
    def vae(self) -> Any:  # type: ignore[override]
        """The autoencoder's configuration."""
        return self._load().config

    def _load(self) -> Autoencoder:
        model = load_vae(self.folder)
        model.config = dataclasses.replace(model.config, **dataclasses.asdict(self.computing))
        return model

    def init(self, key: jax.Array) -> Autoencoder:
        """With random weights."""
        return kind_of(self.folder).autoencoder(self.vae, rngs=nnx.Rngs(key))

    @property
    def initial(self) -> Autoencoder:
        """The model to begin with."""
        return self._load()

    def check(self) -> None:
        """As the autoencoder's; also keeps what the base is.

        Raises:
          UserError: as there; crops don't fill whole latent cells; or the run began with another base.
        """
        check_clip((self.loss_config.batch_size, *self.loss_config.crop), self.vae.compression)
        self.check_crop()
        check_base(self.workdir, self.folder, "vae")
        barrier()
        super().check()

    def flops(self, batch: dict[str, np.ndarray]) -> float:
        """By XLA's count of encoding and decoding; a backward pass is twice a forward pass."""
        return 3 * len(batch["clip"]) * self._clip_flops

    @functools.cached_property
    def _clip_flops(self) -> float:
        model = jax.eval_shape(self.init, jax.random.key(0))
        through = lambda model, clip: model.decode(model.encode(clip)[0])
        clip = jax.ShapeDtypeStruct((1, *self.loss_config.crop, 3), np.float32)
        counted: Any = jax.jit(through).lower(model, clip).cost_analysis()
        return float(counted["flops"])
