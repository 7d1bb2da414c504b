"""Training on top of an open model, a diffusers folder: low-rank updates of it (LoRA), or all of it.

Autoencoder, text encoder, coordinates, patches and the shift of sigmas are the folder's. Of a LoRA the updates alone
are what is trained, averaged and saved; the model is an argument of the step beside them, and a run that goes on reads
it from its folder again.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from ml_collections import ConfigDict

from sora_jax.checkpoints.base_model import check_base
from sora_jax.checkpoints.components import Bundle, Transformer
from sora_jax.checkpoints.pretrained import (
    kind_of,
    load_transformer,
    load_vae,
    pretrained_folder,
    read_shapes,
)
from sora_jax.config import ABSENT, FROM_ZERO, SHARE, check_ranges, component
from sora_jax.data.data_config import DataConfig
from sora_jax.data.encode import LatentsConfig
from sora_jax.data.footage import Footage
from sora_jax.data.pipeline import PipelineConfig
from sora_jax.diffusion import flow
from sora_jax.diffusion.flow import gather_sigmas
from sora_jax.distributed.hosts import barrier
from sora_jax.distributed.mesh import check_heads, check_sequence_split
from sora_jax.errors import UserError
from sora_jax.models.dit_config import Backend, published_flops
from sora_jax.models.low_rank import LoRAConfig, init_lora, with_lora
from sora_jax.models.text import TextEncoder, load_text_encoder
from sora_jax.models.vae import VAE
from sora_jax.models.wan import WanPair
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.dit import DiTObjective, add_noise, velocity_error
from sora_jax.train.loop_config import LoopConfig

_CAPTIONS = 128  # encoded at a time: their states are 1 GB at most


@dataclasses.dataclass(frozen=True)
class FinetuneFlowConfig:
    """How sigmas are drawn.

    Attributes:
      mean, deviation: of the normal logit of σ.
      shift: of all sigmas towards noise (`flow.shift`); 0: the model's own.
      text_dropout: share of segments that learn with the empty prompt, for classifier-free guidance.
    """

    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 0.0
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self, "flow", deviation=FROM_ZERO, shift=FROM_ZERO, text_dropout=SHARE)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """How the transformer computes; its shape is the model's.

    Attributes:
      dtype: of the arithmetic.
      weights: type of the model's own parameters below a LoRA, "int8" of its blocks' matrices (`models.int8`); a model
        that is trained as a whole has float32 ones.
      remat, attention, sequence: as `models.dit_config.DiTConfig`.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    weights: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    remat: Literal["all", "dots", "none"] = "none"
    attention: Backend = "auto"
    sequence: Literal["heads", "ring"] = "heads"


@dataclasses.dataclass(frozen=True)
class FinetuneRun(LoopConfig):
    """Training on top of a diffusers folder.

    Attributes:
      pretrained: the folder, or `hf:OWNER/NAME`. It may have moved when a run goes on.
      text_tokens: tokens of the longest caption; longer ones are cut.
      lora: which matrices get a low-rank update; of rank 0 the whole model is trained.
      transformer: how it computes.
      flow: how sigmas are drawn.
      data: which clips, and of what shapes.
      latents: the latent cache.
      pipeline: how records become packed batches.
    """

    pretrained: str = ""
    text_tokens: int = 512
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    transformer: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    flow: FinetuneFlowConfig = dataclasses.field(default_factory=FinetuneFlowConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    latents: LatentsConfig = dataclasses.field(default_factory=LatentsConfig)
    # The patches are the transformer's.
    pipeline: PipelineConfig = dataclasses.field(
        default_factory=PipelineConfig, metadata={"defaults": {"patch": ABSENT, "coords": ABSENT}}
    )


class FinetuneObjective(DiTObjective):
    """Rectified flow on packed sequences, as `DiTObjective`; σ and caption dropout are drawn per segment.

    What is trained is a LoRA (`models.low_rank`), or the model itself. The folder is read when it is first needed.
    """

    schema: ClassVar[type[LoopConfig]] = FinetuneRun

    def read_model(self, config: ConfigDict) -> None:
        self.pretrained, self.text_tokens = config.pretrained, config.text_tokens
        self.lora = component(LoRAConfig, config.lora, "lora")
        self.transformer = component(TransformerConfig, config.transformer, "transformer")
        self.tuning = component(FinetuneFlowConfig, config.flow, "flow")
        self.pipeline = component(PipelineConfig, config.pipeline, "pipeline")
        for name in ("patch", "coords"):
            if name in config.pipeline:
                raise UserError(f"config.pipeline.{name} is the model's own, and can't be set.")

    @functools.cached_property
    def base(self) -> Bundle:
        """The folder's model, its networks as shapes alone."""
        if not self.pretrained:
            raise UserError(
                "config.pretrained is empty: name a diffusers folder, --config.pretrained=path/to/FOLDER, or "
                "hf:OWNER/NAME."
            )
        base = read_shapes(self.folder)
        if isinstance(base.dit, WanPair):
            raise UserError(
                f"{self.folder} has two transformers (Wan2.2-A14B), which can't be trained here yet."
            )
        assert base.dit is not None
        if base.dit.config.extra_channels:
            raise UserError(
                f"{self.folder} makes videos from a picture, and such models can't be trained here yet."
            )
        return base

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        return pretrained_folder(self.pretrained)

    @functools.cached_property
    def dit(self) -> Any:  # type: ignore[override]
        """The transformer's configuration."""
        assert self.base.dit is not None
        own = {name: getattr(self.transformer, name) for name in ("dtype", "remat", "attention", "sequence")}
        return dataclasses.replace(self.base.dit.config, **own)

    @functools.cached_property
    def template(self) -> Transformer:
        return jax.eval_shape(lambda: self._fresh(jax.random.key(0)))

    def _fresh(self, key: jax.Array) -> Transformer:
        """With random weights."""
        return kind_of(self.folder).transformer.model(self.dit, rngs=nnx.Rngs(key))

    @functools.cached_property
    def vae(self) -> Any:
        """The folder's autoencoder."""
        return load_vae(self.folder)

    @functools.cached_property
    def text(self) -> Any:  # type: ignore[override]
        return dataclasses.replace(self.base.text, max_tokens=self.text_tokens, cache_size=_CAPTIONS)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The folder's, which is read whole for each call: what it gave is kept in the workdir."""
        return load_text_encoder(self.text, kept_states=self.workdir / "text_states")

    def shift(self, lengths: jax.Array) -> Any:
        """Of sigmas towards noise, in segments of so many tokens."""
        return self.tuning.shift or self.base.shift_factor(lengths)

    def init(self, key: jax.Array) -> Any:
        check_heads(self.dit.heads, self.dit.heads_over)
        check_sequence_split(self.pipeline.seq_len, 0)
        return init_lora(self.template, self.lora, key) if self.lora.rank else self._fresh(key)

    @property
    def initial(self) -> Transformer | None:
        """The model to begin with; None where a LoRA is trained, which begins as `init` gives it."""
        return None if self.lora.rank else self._load("float32")

    @property
    def frozen(self) -> dict[str, Any]:
        """What `loss` takes too: the empty prompt's states [M, E], and the model that a LoRA is for."""
        [uncaptioned] = self.text_encoder.encode([""])
        base = {"model": self._load(self.transformer.weights)} if self.lora.rank else {}
        return {"uncaptioned": np.array(uncaptioned)} | base

    def _load(self, weights: str) -> Transformer:
        # Of several devices each takes its shards of what the host holds; of one, tensors go there one by one.
        to_device = jax.device_count() == 1
        place = lambda name, array: jnp.asarray(array) if to_device else array
        return load_transformer(self.folder, self.dit, weights=weights, place=place)

    def whole(self, model: Any, frozen: dict[str, Any]) -> Transformer:
        """The transformer with what is trained."""
        return with_lora(frozen["model"], model, self.lora) if self.lora.rank else model

    def loss(
        self, model: Any, batch: PackedBatch, key: jax.Array, *frozen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean square of the velocity's error over the generated tokens; `frozen` is the attribute of that name."""
        [given] = frozen
        sigma_key, noise_key, drop_key = jax.random.split(key, 3)
        shape = len(batch.patches), self.pipeline.max_segments + 1
        # All tokens of a segment, as when it is sampled.
        lengths = jnp.sum(batch.segment_ids[:, :, None] == jnp.arange(shape[1]), axis=1)
        drawn = flow.draw_sigma(sigma_key, shape, self.tuning.mean, self.tuning.deviation)
        noisy, target, sigma = add_noise(batch, flow.shift(drawn, self.shift(lengths)), noise_key)
        is_kept = jax.random.bernoulli(drop_key, 1 - self.tuning.text_dropout, shape)
        seen = uncaption(batch, is_kept, given["uncaptioned"])
        predicted = self.whole(model, given)(noisy, seen, sigma)
        return velocity_error(predicted, target, batch, gather_sigmas(sigma, batch.condition_ids)[..., None])

    def check(self) -> None:
        """As the transformer's; also makes the base's patches the data's, and keeps what the base is.

        Raises:
          UserError: as the transformer's; frames don't fill whole patches; or the run began with another base.
        """
        self.pipeline = dataclasses.replace(self.pipeline, patch=self.dit.patch, coords=self.dit.coords)
        cell = tuple(a * b for a, b in zip(self.vae.config.compression, self.dit.patch, strict=True))
        if any(size % by for size, by in zip(self.data_config.grid, cell, strict=True)):
            raise UserError(
                f"config.data.grid={self.data_config.grid} and a token of {self.pretrained} is {cell[0]} frames of "
                f"{cell[1]}×{cell[2]} pixels: set config.data.grid={cell[0]},{cell[1]},{cell[2]}."
            )
        if self.text.attend_padding and self.text_tokens != (own := self.base.text.max_tokens):
            raise UserError(
                f"{self.pretrained} fills captions up to {own} tokens and attends to all: set config.text_tokens={own}."
            )
        if not self.lora.rank and self.transformer.weights != "float32":
            raise UserError(
                f"config.transformer.weights={self.transformer.weights!r} is for the model below a LoRA: one that is "
                "trained as a whole (config.lora.rank=0) has float32 weights; set that."
            )
        jax.eval_shape(self.init, jax.random.key(0))  # the LoRA's targets
        check_base(self.workdir, self.folder)
        barrier()
        super().check()

    def prepare(self) -> None:
        """Encodes captions many at a time, as each call reads the whole text encoder; it keeps their states."""
        for source, _ in self.sources:
            if isinstance(source, Footage):
                captions = list(dict.fromkeys(source.captions()))
                for start in range(0, len(captions), _CAPTIONS):
                    self.text_encoder.encode(captions[start : start + _CAPTIONS], truncate=True)

    def bundle(self, name: str, vae: VAE, dit: Any = None) -> Bundle:
        return dataclasses.replace(self.base, name=name, vae=vae, dit=dit, limits=self.limits)

    def flops(self, batch: PackedBatch) -> float:
        count = lambda ids: np.bincount(ids, minlength=self.pipeline.max_segments + 1)[1:].astype(float)
        rows = zip(batch.segment_ids, batch.text_segment_ids, strict=True)
        one = lambda n, m: published_flops(self.dit, n.sum(), (n**2).sum(), m.sum(), (n * m).sum())
        once = sum(one(count(ids), count(words)) for ids, words in rows)
        # A backward pass is two, of which a LoRA has the one to the layers before.
        return (2 if self.lora.rank else 3) * float(once)

    def sample_sheet(self, model: Any, step: int, *frozen: Any) -> PIL.Image.Image | None:
        return super().sample_sheet(self.whole(model, *frozen), step)


def uncaption(batch: PackedBatch, is_kept: jax.Array, uncaptioned_me: jax.Array) -> PackedBatch:
    """The batch, in which segments have the empty prompt in place of each of their captions.

    Args:
      is_kept: bool[B, K + 1], segments that keep their captions.
      uncaptioned_me: states of the empty prompt, which are no more than any caption's.
    """
    ids, time, index = batch.text_segment_ids, batch.text_time, jnp.arange(batch.text_time.shape[1])
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = (ids != before(ids)) | (time != before(time))
    place = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)  # in its own caption
    kept = jnp.take_along_axis(is_kept, ids, axis=1)
    count = len(uncaptioned_me)
    text = jnp.where(kept[..., None], batch.text, jnp.asarray(uncaptioned_me)[jnp.minimum(place, count - 1)])
    ids = jnp.where(kept | (place < count), ids, 0)
    return dataclasses.replace(batch, text=text, text_segment_ids=ids)
