"""Learning the diffusion transformer: the velocity of packed segments, each at a σ of its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from sora_jax.checkpoints.bundle import load_bundle, measure_latents, save_bundle, take_weights
from sora_jax.checkpoints.components import Bundle, Limits, Sampling
from sora_jax.config import ABSENT, COUNT, FROM_ZERO, SHARE, check_ranges, component
from sora_jax.data.data_config import DataConfig
from sora_jax.data.encode import LatentsConfig, encode_sources
from sora_jax.data.footage import Footage
from sora_jax.data.pipeline import SEGMENT_CONDITIONS, PipelineConfig, make_pipeline
from sora_jax.data.shards import own_shards
from sora_jax.data.sources import announce, heldout_sources, make_sources, summarise
from sora_jax.data.survey import Summaries
from sora_jax.diffusion import flow
from sora_jax.diffusion.flow import gather_sigmas
from sora_jax.diffusion.guidance import without_caption
from sora_jax.distributed.hosts import barrier
from sora_jax.distributed.mesh import Share, check_heads, check_sequence_split
from sora_jax.errors import UserError
from sora_jax.media.clip import ClipSource
from sora_jax.models.dit import DiT, Routing
from sora_jax.models.dit_config import DiTConfig, segment_flops
from sora_jax.models.layers import rms_norm
from sora_jax.models.text import TextConfig, TextEncoder, load_text_encoder
from sora_jax.models.vae import VAE
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.loop_config import LoopConfig
from sora_jax.train.target import TargetConfig


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How sigmas are drawn.

    Attributes:
      mean, deviation: of the normal logit of σ.
      sigma_per: whether each "segment" of a packed sequence has a σ of its own, or all of a "sequence" have one, which
        is then shifted by each one's length.
      base_tokens: runs longer than this are shifted towards noise, see `flow.shift_factor`.
      text_dropout: share of runs that learn without their words, for classifier-free guidance.
      text_noise: deviation of noise on the words' states, in their own root mean square: near words, which training
        may never have seen, then mean nearly the same.
      routing: share of tokens that skip the layers between the first and the last (`models.dit.Routing`).
      contrast: λ of contrastive flow matching (Stoica et al. 2025): the velocity is also pushed away from that of
        other tokens.
      self_guidance: classifier-free guidance scale that the model is to have by itself, in one evaluation a step
        (`DiTObjective.guided_target`), from what `text_dropout` teaches it of clips without words; 1: off.
      self_guidance_low: σ up to which it learns the plain velocity all the same.
    """

    mean: float = 0.0
    deviation: float = 1.0
    sigma_per: Literal["segment", "sequence"] = "segment"
    base_tokens: float = 64.0
    text_dropout: float = 0.1
    text_noise: float = 0.0
    routing: float = 0.0
    contrast: float = 0.0
    self_guidance: float = 1.0
    self_guidance_low: float = 0.0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("text_dropout", "routing", "contrast", "self_guidance_low"), SHARE)
        counts = {"base_tokens": COUNT, "self_guidance": COUNT}
        check_ranges(self, "flow", deviation=FROM_ZERO, text_noise=FROM_ZERO, **counts, **shares)


@dataclasses.dataclass(frozen=True)
class DiTRun(LoopConfig):
    """Training a diffusion transformer.

    Attributes:
      autoencoder: a bundled model, a folder that holds one, or the workdir of an autoencoder's run; "pixels" or "grey":
        none, a token is pixels (`models.pixels`).
      init_from: a model, or a run, whose weights are the ones to begin with; empty: random ones.
      dit: shape of the transformer.
      text: the text encoder.
      flow: how sigmas are drawn.
      data: which clips, and of what shapes.
      latents: the latent cache.
      pipeline: how records become packed batches.
      video: the clip that the configuration is about, for the planner; none: no such clip.
    """

    autoencoder: str = "toyworld"
    init_from: str = ""
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    latents: LatentsConfig = dataclasses.field(default_factory=LatentsConfig)
    # The patches are the transformer's.
    pipeline: PipelineConfig = dataclasses.field(
        default_factory=PipelineConfig, metadata={"defaults": {"patch": ABSENT, "coords": ABSENT}}
    )
    video: TargetConfig | None = None


class Sheets(Protocol):
    """What draws sheets of samples of a run."""

    def check(self) -> None:
        """Tries what sheets will need; raises UserError where they can't be drawn."""

    def draw(self, model: Any, step: int) -> PIL.Image.Image | None:
        """The sheet; None where there is nothing to show."""


class DiTObjective:
    """Rectified flow on packed sequences; σ and caption dropout are drawn per segment, never per sequence."""

    schema: ClassVar[type[LoopConfig]] = DiTRun

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        sheets: Callable[[DiTObjective], Sheets] | None = None,
    ) -> None:
        """Args: `sheets` makes what draws sheets of samples (`train.sheets`); None: no sheet is drawn."""
        self.workdir = workdir
        self.data_config = component(DataConfig, config.data, "data")
        self.latents = component(LatentsConfig, config.latents, "latents")
        self.read_model(config)
        self.sheets = sheets(self) if sheets and config.get("log", {}).get("sheet_every", 0) else None

    def read_model(self, config: ConfigDict) -> None:
        """Takes from a configuration what says which model is trained, and how."""
        self.init_from, self.autoencoder = config.get("init_from", ""), config.autoencoder
        self._vae: VAE | None = None
        self.dit = component(DiTConfig, config.dit, "dit")
        self.text = component(TextConfig, config.text, "text")
        self.flow = component(FlowConfig, config.flow, "flow")
        own = {"patch": self.dit.patch, "coords": self.dit.coords}
        self.pipeline = component(PipelineConfig, dict(config.pipeline) | own, "pipeline")
        if self.flow.routing and self.dit.layers < 3:
            raise UserError(
                f"config.flow.routing={self.flow.routing:g} has no layers to skip between the first and the last of "
                f"{self.dit.layers}: set 0, or more layers."
            )

    @property
    def template(self) -> Any:
        """The transformer's shapes."""
        return jax.eval_shape(lambda: DiT(self.dit, rngs=nnx.Rngs(0)))

    def init(self, key: jax.Array) -> DiT:
        # Before hours of encoding.
        check_heads(self.dit.heads, self.dit.heads_over)
        check_sequence_split(self.pipeline.seq_len, self.dit.text_positions(self.pipeline.text_len))
        fresh = DiT(self.dit, rngs=nnx.Rngs(params=key))
        return take_weights(fresh, self.init_from, "dit") if self.init_from else fresh

    def loss(self, model: DiT, batch: PackedBatch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean square of the velocity's error over the generated tokens."""
        keys = dict(zip(("sigma", "noise", "drop", "text"), jax.random.split(key, 4), strict=True))
        seen = self.drop_captions(batch, keys["drop"])
        B, K = batch.patches.shape[0], self.pipeline.max_segments
        # A segment's σ is shifted by all its tokens, conditioning too: its redundancy comes from them.
        lengths = jnp.sum(batch.segment_ids[:, :, None] == jnp.arange(K + 1), axis=1)
        drawn = (B, K + 1 if self.flow.sigma_per == "segment" else 1)
        segment_sigma = flow.draw_sigma(keys["sigma"], drawn, self.flow.mean, self.flow.deviation)
        segment_sigma = flow.shift(segment_sigma, flow.shift_factor(lengths, self.flow.base_tokens))
        blur = self.flow.text_noise * jax.random.normal(keys["text"], batch.text.shape)
        noisy, target, sigma = add_noise(batch, segment_sigma, keys["noise"])
        token_sigma = gather_sigmas(sigma, batch.condition_ids)[..., None]
        seen = dataclasses.replace(seen, text=rms_norm(batch.text) + blur)
        share = self.flow.routing
        routing: dict[str, Any] = {"routing": Routing(jax.random.fold_in(key, 0), share)} if share else {}
        predicted = model(noisy, seen, sigma, **routing)
        if self.flow.self_guidance > 1:
            uncaptioned = jax.lax.stop_gradient(model)(noisy, without_caption(seen), sigma, **routing)
            target = self.guided_target(target, predicted, uncaptioned, seen, token_sigma)
        loss, metrics = velocity_error(predicted, target, batch, token_sigma)
        if self.flow.contrast:  # half a sequence on there is mostly another segment
            other = jnp.roll(target, target.shape[1] // 2, axis=1)
            loss -= self.flow.contrast * velocity_error(predicted, other, batch, token_sigma)[0]
        return loss, metrics

    def guided_target(
        self,
        target: jax.Array,
        predicted: jax.Array,
        uncaptioned: jax.Array,
        seen: PackedBatch,
        token_sigma: jax.Array,
    ) -> jax.Array:
        """The velocity to learn, moved away from what the model predicts without the caption, all [B, N, P].

        Model guidance (Tang et al. 2025): v* = v + λ (v_captioned − v_uncaptioned), of the model's own predictions
        and without gradient. A model that predicts v* gives v_uncaptioned + (v − v_uncaptioned) / (1 − λ), which is
        classifier-free guidance of scale 1 / (1 − λ): so λ is 1 − 1 / `self_guidance`. Segments that have no caption,
        or whose caption is dropped, learn the plain velocity.
        """
        segments = jnp.arange(self.pipeline.max_segments + 1)
        has_caption = jnp.any(seen.text_segment_ids[:, :, None] == segments, axis=1)
        moved = gather_sigmas(has_caption, seen.segment_ids)[..., None]
        moved &= token_sigma > self.flow.self_guidance_low
        share = 1 - 1 / self.flow.self_guidance
        return target + share * jax.lax.stop_gradient(jnp.where(moved, predicted - uncaptioned, 0.0))

    def drop_captions(self, batch: PackedBatch, key: jax.Array) -> PackedBatch:
        """The batch, in which a share of the segments lacks its caption."""
        shape = len(batch.patches), self.pipeline.max_segments + 1
        kept = jax.random.bernoulli(key, 1 - self.flow.text_dropout, shape)
        ids = batch.text_segment_ids
        ids = jnp.where(jnp.take_along_axis(kept, ids, axis=1), ids, 0)
        return dataclasses.replace(batch, text_segment_ids=ids)

    def shapes(self, batch_size: int) -> PackedBatch:
        """Of a batch of so many packed sequences, as `loss` takes it."""
        sizes, dit = self.pipeline, self.dit
        conditions = sizes.max_segments * SEGMENT_CONDITIONS
        return PackedBatch.shapes(
            batch_size,
            sizes.seq_len,
            sizes.text_len,
            conditions,
            dit.patch_width,
            dit.text_width,
            reference=True,
        )

    def check(self) -> None:
        """Tries what the run will need, before any long work: says what the files are, and reads the sheets' clips.

        Raises:
          UserError: the data can't be used, the text encoder isn't there or is of another width than the transformer
            takes, or a caption could be longer than `pipeline.text_len`.
        """
        if self.text_encoder.width != self.dit.text_width:
            raise UserError(
                f"The text encoder's states have {self.text_encoder.width} numbers and the transformer takes "
                f"{self.dit.text_width}: set config.dit.text_width={self.text_encoder.width}."
            )
        if self.text.max_tokens > self.pipeline.text_len:
            raise UserError(
                f"A caption may have {self.text.max_tokens} tokens (config.text.max_tokens) and a sequence has room "
                f"for {self.pipeline.text_len} (config.pipeline.text_len): raise the second or lower the first."
            )
        announce(self.sources)
        self._warn_of_long_captions()
        if self.sheets:
            self.sheets.check()

    def prepare(self) -> None:
        """What is best done before clips are encoded, once all is known to be there."""

    def data(self, config: ConfigDict, share: Share) -> grain.IterDataset:
        own_shards(share, self.pipeline.shards, self.pipeline.batch_size)
        self.check()  # before hours of encoding
        self.prepare()
        records = encode_sources(
            self.latents,
            self.data_config,
            self.vae,
            self.text,
            self.latents_folder,
            self.sources,
            self.text_encoder,
        )
        return make_pipeline(self.pipeline, records, share, stride=self.vae.config.compression[0])

    def heldout_data(self, share: Share, batches: int) -> list[PackedBatch]:
        """Of the validation split as many clips as might fill the batches, at most a twentieth of training's."""
        most = batches * self.pipeline.batch_size * self.pipeline.max_segments
        clips = max(min(most, self.latents.clips // 20), 1)
        sources = heldout_sources(self.data_config, clips)
        if not sources:
            return []
        latents = dataclasses.replace(self.latents, clips=clips)
        data = dataclasses.replace(self.data_config, split="validation", clips=clips)
        records = encode_sources(
            latents, data, self.vae, self.text, self.latents_folder / "heldout", sources, self.text_encoder
        )
        # Few bins, since all are to be filled before the first sequence is full.
        bins, stride = min(self.pipeline.num_packing_bins, 8), self.vae.config.compression[0]
        pipeline = dataclasses.replace(self.pipeline, num_packing_bins=bins, prefetch=0)
        return list(itertools.islice(make_pipeline(pipeline, records, share, stride=stride), batches))

    @property
    def latents_folder(self) -> pathlib.Path:
        """Where clips are kept encoded."""
        return pathlib.Path(self.latents.folder) if self.latents.folder else self.workdir / "latents"

    @functools.cached_property
    def sources(self) -> list[tuple[ClipSource, float]]:
        return make_sources(self.data_config)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        return load_text_encoder(self.text)

    def data_summary(self) -> Summaries | None:
        """What the files among the data sets are, and what of them could not be read until now."""
        return summarise(self.sources)

    def _warn_of_long_captions(self) -> None:
        captions = [
            caption
            for source, _ in self.sources
            if isinstance(source, Footage)
            for caption in source.captions()
            if caption
        ]
        most = self.text.max_tokens
        long = [caption for caption in captions if self.text_encoder.count_tokens(caption) > most]
        if long and jax.process_index() == 0:
            tqdm.write(
                f"note: {len(long)} of {len(captions)} captions have more than the {most} tokens that the text encoder "
                f"takes and are cut ({long[0][:40]!r} is one): shorten them, or raise config.text.max_tokens.",
                file=sys.stderr,
            )

    @property
    def vae(self) -> VAE:
        """The frozen autoencoder, kept in `workdir/autoencoder` so that the run stays whole if the first one goes.

        All hosts must ask for it together.
        """
        if self._vae is None:
            own = self.workdir / "autoencoder"
            if jax.process_index() == 0 and not (own / "config.json").is_file():
                vae = load_bundle(self.autoencoder).vae
                if vae.config.latent_std == (1.0,):
                    [(source, _), *_] = self.sources
                    vae = measure_latents(vae, [source[i].video.frames for i in range(min(64, len(source)))])
                save_bundle(self.bundle("autoencoder", vae), own, dtype="float32")
            barrier()
            self._vae = load_bundle(own).vae
        return self._vae

    @property
    def limits(self) -> Limits:
        """The largest segment of this training."""
        sizes, data = self.pipeline, self.data_config
        return Limits(
            tokens=sizes.seq_len,
            latent_frames=max(1 + (shape[0] - 1) // data.grid[0] for shape in data.shapes()),
            frame_tokens=sizes.frame_tokens,
            resolution=min(data.resolutions),
            fps=max(data.rates),
            grid=data.grid[1:],
            text=min(self.text.max_tokens, sizes.text_len),
            text_len=sizes.text_len,
        )

    def bundle(self, name: str, vae: VAE, dit: Any = None) -> Bundle:
        """A model of this run, as `pipeline.Pipeline` and `save_bundle` take it."""
        # What has learned its guidance is sampled without.
        sampling = Sampling(guidance=1.0) if self.flow.self_guidance > 1 else Sampling()
        return Bundle(name, vae, dit, self.text, self.limits, self.flow.base_tokens, sampling)

    def flops(self, batch: PackedBatch) -> float:
        count = lambda ids: np.bincount(ids, minlength=self.pipeline.max_segments + 1)[1:].astype(float)
        rows = zip(batch.segment_ids, batch.text_segment_ids, strict=True)
        passes = 4 if self.flow.self_guidance > 1 else 3  # a backward pass is two
        return passes * float(
            sum(np.sum(segment_flops(self.dit, count(ids), count(words))) for ids, words in rows)
        )

    def tokens(self, batch: PackedBatch) -> tuple[int, int]:
        return int(np.count_nonzero(batch.segment_ids)), batch.segment_ids.size

    def sample_sheet(self, model: Any, step: int, *frozen: Any) -> PIL.Image.Image | None:
        """The sheet of `train.sheets`; None where this objective was made without one."""
        return self.sheets.draw(model, step) if self.sheets else None


def add_noise(
    batch: PackedBatch, segment_sigma: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noisy patches and the velocity to learn, both [B, N, P], and the σ of each condition [B, S].

    Args:
      segment_sigma: of each segment [B, K + 1], or one for all [B, 1].
    """
    sigma = jnp.minimum(gather_sigmas(segment_sigma, batch.condition_segment_ids), batch.condition_init_sigma)
    noise = jax.random.normal(key, batch.patches.shape)
    noisy = flow.interpolate(batch.patches, noise, gather_sigmas(sigma, batch.condition_ids)[..., None])
    return noisy, flow.velocity(batch.patches, noise), sigma


def velocity_error(
    predicted: jax.Array, target: jax.Array, batch: PackedBatch, token_sigma: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean square of a velocity's error [B, N, P] over the generated tokens, and that of the clean patches it means."""
    generated = (batch.segment_ids > 0) & ~batch.conditioning_mask
    error = jnp.mean(jnp.square(predicted - target), axis=-1)
    count = jnp.maximum(jnp.sum(generated), 1)
    clean_error = jnp.sum(error * jnp.square(token_sigma[..., 0]) * generated) / count
    return jnp.sum(error * generated) / count, {"clean_error": clean_error}
