"""What the training loop reads: packed batches of latents for the DiT, plain batches of clips for the VAE."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from sora_jax.config import COUNT, FROM_ZERO, SEED, SHARE, check_ranges
from sora_jax.data.latents import LatentCache, Record, Records
from sora_jax.data.masks import CANVASES, draw_canvas
from sora_jax.data.shards import Sharded, own_shards
from sora_jax.distributed.mesh import WHOLE, Share
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip, ClipSource
from sora_jax.tokens.canvas import Canvas, tile_size, to_segment
from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch, stream_sequences
from sora_jax.tokens.patches import CoordinateMode, Grid
from sora_jax.tokens.spans import FRAMES_PER_LATENT

SEGMENT_CONDITIONS = 2  # pairs of initial σ and active caption that a training segment may have


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How records become packed batches.

    Attributes:
      seq_len: N, token positions per sequence.
      text_len: M, text positions per sequence.
      batch_size: B, packed sequences of the global batch, over all hosts.
      shards: streams that the records are split into, each with a packer and an equal part of the batch (see
        `data.shards`). A run keeps their number; its number of hosts may change, and must divide it.
      max_segments: K, the most segments a sequence may hold.
      patch: latent frames, rows and columns of cells a patch.
      coords: see `patches.coordinates`.
      seed: of the order and of the captions drawn.
      canvases: weights of the kinds of `masks.draw_canvas`; empty: no conditioning but that of the latents' layouts.
      temporal_crop_prob: probability of a temporal crop.
      frame_tokens: frames of more tokens are cropped to at most this many, as the sampler's are; 0: none is.
      caption_weights: weights of the kinds of caption, among those a record has; empty: uniform.
      caption_noise: share of clips that have another clip's captions, the same in every epoch, as text found beside a
        video often doesn't say what it shows.
      num_packing_bins: sequences that a shard has open at a time, see `packing.stream_sequences`.
      buckets: whether a sequence has clips of one shape alone; with `batch_size` 1 so has a batch, as where clips are
        batched by shape (Open-Sora's buckets).
      threads: that read records, on this host.
      prefetch: batches that are made ahead.
    """

    seq_len: int = 512
    text_len: int = 256
    batch_size: int = 8
    shards: int = 1
    max_segments: int = 32
    patch: Grid = (1, 2, 2)
    coords: CoordinateMode = "fractional"
    seed: int = 0
    canvases: Mapping[str, float] = dataclasses.field(default_factory=dict, metadata={"keys": CANVASES})
    temporal_crop_prob: float = 0.0
    frame_tokens: int = 0
    caption_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    caption_noise: float = 0.0
    num_packing_bins: int = 64
    buckets: bool = False
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        counts = ("seq_len", "text_len", "batch_size", "shards", "max_segments", "patch", "num_packing_bins")
        more = dict.fromkeys(("frame_tokens", "threads", "prefetch"), FROM_ZERO)
        more |= {"seed": SEED, "temporal_crop_prob": SHARE, "caption_noise": SHARE}
        check_ranges(self, "pipeline", **dict.fromkeys(counts, COUNT), **more)


def make_pipeline(
    config: PipelineConfig,
    records: str | os.PathLike[str] | Records,
    share: Share = WHOLE,
    epochs: int | None = None,
    stride: int = FRAMES_PER_LATENT,
) -> grain.IterDataset[PackedBatch]:
    """Streams packed batches (NumPy, float32), reshuffled each epoch; its iterators have an exact, JSON-able state.

    Args:
      records: a latent cache, its folder, or any sequence of records; latents enter as they are, so encode them
        normalised (`VAE.to_latent`).
      share: which part of the global batch is this host's. Each epoch is split into the shards: theirs are disjoint
        and together complete.
      epochs: passes over the records; None never ends. The last batch of a finite stream is filled with empty
        sequences.
      stride: video frames of a latent frame.

    Raises:
      UserError: there are no records, the shards can't be split over the hosts, or (while iterating) a segment is
        longer than a sequence or has no caption of a kind that is wanted.
    """
    if isinstance(records, (str, os.PathLike)):
        records = LatentCache(records)
    if len(records) == 0:
        raise UserError("There are no records to train on: encode some clips first.")
    if config.caption_noise:
        records = Miscaptioned(records, config.caption_noise, config.seed)
    segments = (
        grain.MapDataset.source(records)
        .shuffle(seed=config.seed)
        .repeat(epochs)
        .random_map(functools.partial(draw_segment, config=config, stride=stride), seed=config.seed)
    )
    own = own_shards(share, config.shards, config.batch_size)
    options = _read_options(_each(config.threads, own))
    streams = {shard: segments[shard :: config.shards].to_iter_dataset(options) for shard in own}
    limits = config.seq_len, config.text_len, config.max_segments, config.num_packing_bins
    sequences = {
        shard: stream_sequences(stream, *limits, SEGMENT_CONDITIONS, config.buckets)
        for shard, stream in streams.items()
    }

    def collate(sequences: list[list[Segment]]) -> PackedBatch:
        conditions = config.max_segments * SEGMENT_CONDITIONS
        return pack_batch(sequences, len(sequences), config.seq_len, config.text_len, conditions)[0]

    batches = Sharded(sequences, config.batch_size // config.shards, empty=[]).map(collate)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)


class Miscaptioned:
    """Records, a share of which has another one's captions, by `seed`."""

    def __init__(self, records: Records, share: float, seed: int) -> None:
        self.records, self.share, self.seed = records, share, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        rng, record = np.random.default_rng((self.seed, index)), self.records[index]
        if len(self) < 2 or rng.random() >= self.share:
            return record
        other = (index + int(rng.integers(1, len(self)))) % len(self)
        return record | {"captions": self.records[other]["captions"]}

    def __repr__(self) -> str:
        return f"Miscaptioned({self.records!r}, {self.share}, {self.seed})"


def draw_segment(
    record: Record,
    rng: np.random.Generator,
    config: PipelineConfig,
    stride: int = FRAMES_PER_LATENT,
) -> Segment:
    """Makes a record a segment, with one of its captions and a canvas drawn at random; `stride` is a canvas's."""
    latent = record["latent"].astype(np.float32)
    init_sigma = np.broadcast_to(np.where(record["given"], 0.0, 1.0)[:, None, None], latent.shape[:3])
    own = init_sigma.astype(np.float32), record["ends"], record["first"], record["fps"]
    whole = Canvas(latent, *own, stride=stride)
    if config.frame_tokens:
        sides = tile_size(whole.grid, config.patch, config.frame_tokens)
        steps = ((size - side) // by for size, side, by in zip(latent.shape[1:3], sides, config.patch[1:]))
        top, left = (int(rng.integers(count + 1)) * by for count, by in zip(steps, config.patch[1:]))
        whole = whole.crop(top, left, *sides)
    tokens_per_frame = math.prod(whole.grid[1:]) // math.prod(config.patch[1:])
    most = max(config.seq_len // tokens_per_frame, 1) * config.patch[0]
    canvas = draw_canvas(rng, whole, config.canvases, config.temporal_crop_prob, most)
    caption = record["captions"][_draw_kind(record, rng, config.caption_weights)]
    segment = to_segment(canvas, config.patch, caption["text"], caption["time"], config.coords, record["key"])
    # More conditions than a segment may have (partially noised frames and shots at once): noise fully.
    if segment.num_conditions > SEGMENT_CONDITIONS:
        segment = dataclasses.replace(segment, init_sigma=np.ceil(segment.init_sigma))
    return segment


def clip_batches(
    sources: ClipSource | Sequence[tuple[ClipSource, float]],
    batch_size: int,
    shape: tuple[int, int, int],
    seed: int = 0,
    shards: int = 1,
    share: Share = WHOLE,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Streams batches {"clip": uint8[B,T,Y,X,3]} without end, for the VAE; checkpointable as `make_pipeline`.

    Args:
      sources: one data set, or several with their weights. Each is reshuffled each time it has been read through.
      batch_size: B, clips of the global batch, over all hosts.
      shape: (T, Y, X) of the random crop of each clip, in frames and pixels.
      shards, share: as in `PipelineConfig.shards` and `make_pipeline`.
      threads: that render or decode clips, on this host.
      prefetch: clips, beyond one batch, that are made ahead.

    Raises:
      UserError: a source is empty, no weight is positive, or (while iterating) a clip is smaller than the crop.
    """
    several = isinstance(sources, (list, tuple)) and all(isinstance(source, tuple) for source in sources)
    pairs: Any = sources if several else [(sources, 1.0)]
    weighted = [pair for pair in pairs if pair[1] > 0]
    if not weighted or any(len(source) == 0 for source, _ in weighted):
        raise UserError(
            "There are no clips to train on: give at least one data set that isn't empty a weight above 0."
        )
    crop = functools.partial(_crop, shape=shape)
    weights = [weight for _, weight in weighted]
    own = own_shards(share, shards, batch_size, "config.loss")
    each = _each(threads, own)
    streams = {}
    for shard in own:
        shares = []
        for index, (source, _) in enumerate(weighted):
            # A shard takes its part before mixing, or its stride could coincide with the mixture's period.
            clips = grain.MapDataset.source(source).shuffle(seed=seed + index).repeat()
            shares.append(clips.random_map(crop, seed=seed + index)[shard::shards])
        mixture = grain.MapDataset.mix(shares, weights=weights)
        streams[shard] = mixture.to_iter_dataset(_read_options(each, batch_size // shards + prefetch))
    return Sharded(streams, batch_size // shards).map(_stack)


def _stack(clips: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}


def _draw_kind(record: Record, rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    kinds = sorted(record["captions"])
    chances = np.array([weights.get(kind, 0.0) if weights else 1.0 for kind in kinds])
    if not chances.sum() > 0:
        raise UserError(
            f"The clip {record['key']!r} has captions of the kinds {', '.join(kinds) or 'none'}, but the pipeline "
            f"wants {', '.join(weights) or 'any'}: change caption_weights."
        )
    return kinds[rng.choice(len(kinds), p=chances / chances.sum())]


def _crop(clip: Clip, rng: np.random.Generator, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    frames = clip.video.frames
    if any(size < wanted for size, wanted in zip(frames.shape, shape)):
        raise UserError(
            f"The clip {clip.key!r} is {'×'.join(map(str, frames.shape[:3]))} (frames, height, width), smaller than "
            f"the crop of {'×'.join(map(str, shape))}: use larger clips or a smaller crop."
        )
    corner = [int(rng.integers(size - wanted + 1)) for size, wanted in zip(frames.shape, shape)]
    return {"clip": frames[tuple(slice(start, start + wanted) for start, wanted in zip(corner, shape))]}


def _each(threads: int, shards: Sequence[int]) -> int:
    """A shard's part of the host's threads; 0: its clips are made on demand."""
    return max(threads // len(shards), min(threads, 1))


def _read_options(threads: int, ahead: int = 64) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
