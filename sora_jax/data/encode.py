"""From clips to training records of the DiT: latents and text states, each encoded once by the frozen encoders."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sora_jax.config import COUNT, FROM_ZERO, check_ranges
from sora_jax.data.data_config import DataConfig
from sora_jax.data.footage import Footage
from sora_jax.data.latents import LatentCache, Record, Records, earlier_cache, write_latents
from sora_jax.data.masks import LAYOUTS, draw_layout
from sora_jax.media.clip import Clip, ClipSource
from sora_jax.media.digests import array_digest, value_digest
from sora_jax.models.text import TextConfig, TextEncoder, load_text_encoder, text_digest
from sora_jax.models.tiles import TILES, encode_stream, tiles_of
from sora_jax.models.vae import VAE
from sora_jax.tokens.spans import frames_shown, split_into_spans

RECORDS = 3  # version; increased where the same inputs give other records
YOUNGER = (("crop", "none"),)  # fields of `DataConfig` with their defaults, since the last version of records
TEXT_PARTS = ("captions", "text encoder")  # parts of a record's identity on which its latent doesn't depend


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
      folder: of the cache; empty: in the run's workdir.
      clips: how many clips are encoded, over all sources, at most: of footage no more than show nearly all of it.
      batch: clips encoded at a time.
      layouts: weights of the kinds of `masks.draw_layout`; empty: every clip is one span.
      given: the first frames, conditioning in every clip, as in benchmarks of prediction; 0: what `layouts` draws.
      store: whether clips are encoded once and kept; else each time one is read, so that they need no room and never
        come twice: for pixels, or where encoding costs little beside a step.
    """

    folder: str = ""
    clips: int = 20_000
    batch: int = 8
    layouts: Mapping[str, float] = dataclasses.field(default_factory=dict, metadata={"keys": LAYOUTS})
    given: int = 0
    store: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "latents", clips=COUNT, batch=COUNT, given=FROM_ZERO)


@dataclasses.dataclass(frozen=True)
class Unstored:
    """Records of a source's first clips, each encoded when it is read."""

    source: ClipSource
    encode: Callable[[list[Clip]], list[Record]]
    clips: int

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.clips:
            raise IndexError(index)
        return self.encode([self.source[index]])[0]


class Chain:
    """Several caches as one sequence of records."""

    def __init__(self, caches: Sequence[Records]) -> None:
        self.caches = caches
        self.ends = np.cumsum([len(cache) for cache in caches])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.caches[which][index - int(self.ends[which]) + len(self.caches[which])]

    def __repr__(self) -> str:
        return f"Chain({list(self.caches)!r})"


def encode_sources(
    config: LatentsConfig,
    data: DataConfig,
    vae: VAE,
    text: TextConfig,
    folder: str | os.PathLike[str],
    sources: Sequence[tuple[ClipSource, float]],
    encoder: TextEncoder | None = None,
) -> Chain:
    """Encodes up to `config.clips` clips of the data sets, in shares by weight, or opens what was encoded before.

    Args:
      sources: what `data` names, with their weights (`sources.make_sources`).
      encoder: of `text`, where it is loaded already.

    Raises:
      UserError: a data set or the text encoder is missing, or the folder holds latents of something else.
    """
    total, wanted = sum(weight for _, weight in sources), natural_clips(sources, config.clips)
    encoder = encoder or load_text_encoder(text)
    encode = make_encoder(vae, encoder, config.layouts, config.given)
    caches: list[Records] = []
    for place, (source, weight) in enumerate(sources):
        clips = max(min(round(wanted * weight / total), len(source)), 1)
        if not config.store:
            caches.append(Unstored(source, encode, clips))
            continue
        own = {"source": str(place), "number of clips": str(clips)}
        parts = own | _identify(config, data, source, vae, text)
        identity = value_digest(parts)[:12]
        cache, known = pathlib.Path(folder) / identity, None
        if not cache.exists() and (earlier := earlier_cache(folder, parts, TEXT_PARTS)):
            before, changed = earlier
            if isinstance(source, Footage) and set(changed) <= set(TEXT_PARTS):
                known = _with_captions(LatentCache(before), source, encoder)
                change = f"these changed: {', '.join(changed)}. The latents in {folder} are kept, only text is encoded."
            else:
                change = (
                    f"the latents in {folder} can't be used any more, as these changed: {', '.join(changed)}. "
                    f"{clips} clips are encoded again."
                )
            if jax.process_index() == 0:
                tqdm.write(f"note: {change}", file=sys.stderr)
        caches.append(
            write_latents(source, encode, cache, identity, clips, config.batch, parts=parts, known=known)
        )
    return Chain(caches)


def natural_clips(sources: Sequence[tuple[ClipSource, float]], most: int) -> int:
    """How many clips of a mixture are worth encoding: as many as show nearly all of the footage in it.

    Args:
      most: never more than that; so many where there is no footage, since toyworld never ends.
    """
    total = sum(weight for _, weight in sources)
    wanted = [
        source.natural_clips * total / weight
        for source, weight in sources
        if isinstance(source, Footage) and weight > 0
    ]
    return min(most, math.ceil(max(wanted, default=most)))


def _with_captions(before: LatentCache, source: Footage, text: TextEncoder) -> Callable[[int], Record]:
    """The records of a cache of the same pixels, with the present captions of the files."""

    def record(index: int) -> Record:
        old = before[index]
        [states] = text.encode([source.caption(old["key"])], truncate=True)
        return old | {"captions": {"short": _join([(0.0, states)])}}

    return record


def _identify(
    config: LatentsConfig, data: DataConfig, source: ClipSource, vae: VAE, text: TextConfig
) -> dict[str, str]:
    """What records depend on, by content: paths of files and weights have no effect."""
    # A field that is younger than stored caches is left out where it has its default, so that they stay valid.
    settings = {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if name not in ("source", "cache") and (name, value) not in YOUNGER
    }
    contents = source.contents() if hasattr(source, "contents") else {"files": type(source).__name__}
    return contents | {
        "config.data": value_digest(settings),
        "config.latents": value_digest(
            [config.batch, sorted(config.layouts.items()), *([config.given] if config.given else [])]
        ),
        "autoencoder": value_digest([repr(vae.config), array_digest(jax.tree.leaves(vae))]),
        "text encoder": text_digest(text),
        "version of sora_jax": str(RECORDS),
    }


def make_encoder(
    vae: VAE, text: TextEncoder, layouts: Mapping[str, float] | None = None, given: int = 0
) -> Callable[[list[Clip]], list[Record]]:
    """A function from clips of one shape (1 + k strides) to the records of a latent cache.

    Clips that are encoded together share a layout (drawn by the first one's key, or the first `given` frames are
    conditioning): one span, or several, see `spans.split_into_spans`.

    A clip's `timed` captions become one caption of kind "timed", of which the part of each shot is active from its
    start; clips of one shot have none.

    Frames of more than a tile, and those of autoencoders that have tiles of their own, are encoded clip by clip, in
    memory that doesn't grow with them (`tiles`).
    """
    stride = vae.config.compression[0]

    def to_latent(clips: np.ndarray) -> np.ndarray:
        if tiles_of(vae) == TILES and TILES.fit(vae.config, *clips.shape[2:4]):
            return np.asarray(_to_latent(vae, clips))
        return np.stack([np.concatenate(list(encode_stream(vae, clip))) for clip in clips])

    def encode(clips: list[Clip]) -> list[Record]:
        frames = np.stack([clip.video.frames for clip in clips])
        rng = np.random.default_rng(zlib.crc32(clips[0].key.encode()))
        conditioning = draw_layout(rng, frames.shape[1], layouts or {"none": 1.0}, given, stride)
        spans = split_into_spans(conditioning, stride)
        last = frames.shape[1] - 1
        shown = [np.minimum(np.arange(span.begin, span.begin + span.frames), last) for span in spans]
        latents = np.concatenate([to_latent(frames[:, places]) for places in shown], axis=1)
        ends = np.concatenate([span.ends for span in spans])
        layout = {
            "ends": ends,
            "first": np.concatenate([span.ends == span.begin for span in spans]),
            "given": np.array([conditioning[of].all() for of in frames_shown(spans, len(conditioning))]),
        }
        captions = [_captions(clip) for clip in clips]
        words = [part for kinds in captions for parts in kinds.values() for _, part in parts]
        states = iter(text.encode(words, truncate=True))
        return [
            {
                "latent": latent,
                "fps": clip.video.fps,
                "key": clip.key,
                "captions": {
                    kind: _join([(start, next(states)) for start, _ in parts])
                    for kind, parts in kinds.items()
                },
            }
            | layout
            for clip, latent, kinds in zip(clips, latents, captions, strict=True)
        ]

    return encode


@jax.jit
def _to_latent(vae: VAE, clips: jax.Array) -> jax.Array:
    """uint8[B,T,Y,X,3] as normalised latents."""
    return vae.to_latent(clips.astype(jnp.float32) / 127.5 - 1.0)


def _captions(clip: Clip) -> dict[str, list[tuple[float, str]]]:
    """By kind, the captions and the seconds from which they are active."""
    kinds = {kind: [(0.0, words)] for kind, words in clip.captions.items()}
    return kinds | ({"timed": list(clip.timed)} if len(clip.timed) > 1 else {})


def _join(timed_states: list[tuple[float, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        "text": np.concatenate([states for _, states in timed_states]),
        "time": np.concatenate([np.full(len(states), start, np.float32) for start, states in timed_states]),
    }
