"""Packs segments into sequences of fixed length and takes them out again (NaViT's patch n' pack)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError
from sora_jax.tokens.bins import BestFit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """B packed sequences of fixed length, each holding many segments. An array may be NumPy's or JAX's.

    The tokens of a sequence share few conditions: a segment, its initial σ and the active caption. They are in a
    conditioning table of length S, so that what depends on them alone is computed S times a sequence; condition 0 is
    that of conditioning tokens.

    Attributes:
      patches: float[B,N,P], clean latent patches.
      coords: float[B,N,5], the box that a token covers: its centre (seconds, y, x) as it enters RoPE, and its
        extent (seconds, height); see `patches.coordinates`.
      segment_ids: int32[B,N], 1…K in order of position; 0 is padding.
      init_sigma: float[B,N], the σ a token starts from: 1 is generated from noise, 0 is conditioning (never noisy, no
        loss), in between it is partially noised.
      condition_ids: int32[B,N], a token's index into the conditioning table; 0 for conditioning tokens and padding.
      text: float[B,M,E], states of the text encoder.
      text_segment_ids: int32[B,M], as above; a segment without a caption has no position here.
      text_time: float[B,M], seconds from which the caption of a text token is active; 0 is the whole clip.
      text_condition_ids: int32[B,M], the condition whose σ a text token shares.
      condition_segment_ids: int32[B,S], the segment a condition belongs to; 0 = unused.
      condition_caption_time: float[B,S], the `text_time` of the caption that is active there.
      condition_init_sigma: float[B,S], the σ it starts from.
      reference: float[B,N,2(P+1)], see `Segment`; None for a model that takes none.
      extra_channels: float[B,N,X], see `Segment`; None for a model that takes none.
      pictures: float[B,I,V], states of the given pictures, see `Segment`; None for a model that takes none.
      picture_segment_ids: int32[B,I], the segment that each of them is of; 0 is none.
    """

    patches: Any
    coords: Any
    segment_ids: Any
    init_sigma: Any
    condition_ids: Any
    text: Any
    text_segment_ids: Any
    text_time: Any
    text_condition_ids: Any
    condition_segment_ids: Any
    condition_caption_time: Any
    condition_init_sigma: Any
    reference: Any = None
    extra_channels: Any = None
    pictures: Any = None
    picture_segment_ids: Any = None

    @classmethod
    def shapes(
        cls,
        batch_size: int,
        seq_len: int,
        text_len: int,
        conditions: int,
        patch_width: int,
        text_width: int,
        reference: bool,
        extra_width: int = 0,
        picture: tuple[int, int] = (0, 0),
    ) -> PackedBatch:
        """One of `jax.ShapeDtypeStruct`s: B, N, M, S - 1, P, E, whether there is `reference`, X, and (I, V)."""
        of = lambda dtype, *shape: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        number, index = functools.partial(of, np.float32), functools.partial(of, np.int32)
        table_len = 1 + conditions
        return cls(
            patches=number(seq_len, patch_width),
            coords=number(seq_len, 5),
            segment_ids=index(seq_len),
            init_sigma=number(seq_len),
            condition_ids=index(seq_len),
            text=number(text_len, text_width),
            text_segment_ids=index(text_len),
            text_time=number(text_len),
            text_condition_ids=index(text_len),
            condition_segment_ids=index(table_len),
            condition_caption_time=number(table_len),
            condition_init_sigma=number(table_len),
            reference=number(seq_len, 2 * (patch_width + 1)) if reference else None,
            extra_channels=number(seq_len, extra_width) if extra_width else None,
            pictures=number(*picture) if picture[0] else None,
            picture_segment_ids=index(picture[0]) if picture[0] else None,
        )

    def with_text_positions(self, count: int) -> PackedBatch:
        """The first so many text positions alone."""
        names = ("text", "text_segment_ids", "text_time", "text_condition_ids")
        return dataclasses.replace(self, **{name: getattr(self, name)[:, :count] for name in names})

    @property
    def conditioning_mask(self) -> Any:
        """bool[B,N]: conditioning tokens; padding is none."""
        return (self.segment_ids > 0) & (self.init_sigma == 0)

    @property
    def caption_mask(self) -> jax.Array:
        """bool[B,N,M]: the positions of a token's active caption; conditioning tokens have all of their segment's."""
        owned = self._owned(self.text_segment_ids)
        time = jnp.take_along_axis(jnp.asarray(self.condition_caption_time), self.condition_ids, axis=1)
        active = (time[:, :, None] == self.text_time[:, None, :]) | (self.condition_ids == 0)[:, :, None]
        return owned & active

    @property
    def picture_mask(self) -> Any:
        """bool[B,N,I]: the states of a token's own pictures."""
        return self._owned(self.picture_segment_ids)

    def _owned(self, others_bm: Any) -> Any:
        """bool[B,N,M]: those of a second sequence that are of a token's segment."""
        return (self.segment_ids[:, :, None] == others_bm[:, None, :]) & (others_bm > 0)[:, None, :]


@dataclasses.dataclass(frozen=True)
class Segment:
    """One clip and its captions, as tokens.

    Attributes:
      patches: float[n,P].
      coords: float32[n,5], see `patches.coordinates`.
      init_sigma: float[n], the σ a token starts from, 0…1; 0 is conditioning.
      caption_time: float[n], the `text_time` of the active caption, see `active_caption_time`.
      text: float[m,E]; m may be 0.
      text_time: float[m], seconds.
      key: names the clip, in errors.
      reference: float[n,2(P+1)], the conditioning patches at a token's own (y, x), latest before it and earliest after
        it, each with its nearness in time, see `patches.reference_patches`; None is none.
      extra_channels: float[n,X], latent channels that stand beside the noisy ones and stay as they are while it is
        sampled (Wan image-to-video: the given picture), as patches; None for a model that takes none.
      pictures: float[i,V], an image encoder's states of the given pictures (`models.vision`); None likewise.
    """

    patches: np.ndarray
    coords: np.ndarray
    init_sigma: np.ndarray
    caption_time: np.ndarray
    text: np.ndarray
    text_time: np.ndarray
    key: str = ""
    reference: Any = None
    extra_channels: Any = None
    pictures: Any = None

    def __post_init__(self) -> None:
        if self.reference is None:
            n, width = self.patches.shape
            object.__setattr__(self, "reference", np.zeros((n, 2 * (width + 1)), np.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its tokens along time, height and width."""
        return tuple(len(np.unique(self.coords[:, axis])) for axis in range(3))

    @property
    def num_conditions(self) -> int:
        """How many rows of a sequence's conditioning table it needs."""
        noisy = self.init_sigma > 0
        return len(np.unique(np.stack([self.init_sigma, self.caption_time])[:, noisy], axis=1).T)


_TOKEN_FIELDS = ("patches", "coords", "init_sigma", "caption_time", "reference", "extra_channels")
_TEXT_FIELDS = ("text", "text_time")


class Placement(NamedTuple):
    """Where a segment is: positions start…start+length of sequence `row`, under `segment_id` (1…K)."""

    row: int
    segment_id: int
    start: int
    length: int


def active_caption_time(time: np.ndarray, text_time: np.ndarray) -> np.ndarray:
    """The `text_time` of the caption that is active at each of `time`: the latest that has begun; float32, as `time`.

    Before the first it is the first's; without captions it is 0.
    """
    starts = np.unique(text_time) if len(text_time) else np.zeros(1)
    which = np.searchsorted(starts, np.asarray(time) + 1e-3, side="right") - 1
    return starts[np.maximum(which, 0)].astype(np.float32)


def first_fit_decreasing(
    segments: Sequence[Segment], seq_len: int, text_len: int, max_segments: int, conditions: int
) -> list[list[int]]:
    """Which segments, by their index, go into one sequence each: few sequences, the longest segments first."""
    sizes = [(len(segment.patches), len(segment.text), segment.num_conditions) for segment in segments]
    order = sorted(
        range(len(segments)), key=lambda i: -max(sizes[i][0] / seq_len, sizes[i][1] / max(text_len, 1))
    )
    packed: list[list[int]] = []
    used: list[list[int]] = []  # tokens, text, conditions and segments of each sequence
    for i in order:
        wanted, most = (*sizes[i], 1), (seq_len, text_len, conditions, max_segments)
        fitting = (
            row
            for row, taken in enumerate(used)
            if all(have + more <= limit for have, more, limit in zip(taken, wanted, most, strict=True))
        )
        row = next(fitting, len(used))
        if row == len(used):
            used.append([0, 0, 0, 0])
            packed.append([])
        used[row] = [have + more for have, more in zip(used[row], wanted, strict=True)]
        packed[row].append(i)
    return packed


def pack_batch(
    sequences: Sequence[Sequence[Segment]],
    batch_size: int,
    seq_len: int,
    text_len: int,
    conditions: int,
    picture_len: int = 0,
) -> tuple[PackedBatch, list[Placement]]:
    """The batch that holds these segments, and the placement of each, sequence after sequence.

    Args:
      sequences: the segments of each sequence, which fit it; some may be empty, but not all.
      batch_size: B; sequences that are missing are empty.
      seq_len, text_len: N and M, positions of a sequence.
      conditions: S - 1, entries of a sequence's table.
      picture_len: I, where segments have pictures.
    """
    like = next(segment for segments in sequences for segment in segments)
    columns = _empty_columns(like, batch_size, seq_len, text_len, picture_len)
    placements = []
    for row, segments in enumerate(sequences):
        start = text_start = picture_start = 0
        for segment_id, segment in enumerate(segments, 1):
            n, m = len(segment.patches), len(segment.text)
            tokens, text = slice(start, start + n), slice(text_start, text_start + m)
            for name in columns.keys() & set(_TOKEN_FIELDS):
                columns[name][row, tokens] = getattr(segment, name)
            for name in _TEXT_FIELDS:
                columns[name][row, text] = getattr(segment, name)
            columns["segment_ids"][row, tokens] = segment_id
            columns["text_segment_ids"][row, text] = segment_id
            if segment.pictures is not None:
                pictures = slice(picture_start, picture_start + len(segment.pictures))
                columns["pictures"][row, pictures] = segment.pictures
                columns["picture_segment_ids"][row, pictures] = segment_id
                picture_start = pictures.stop
            placements.append(Placement(row, segment_id, start, n))
            start, text_start = start + n, text_start + m
    return _with_conditions(columns, conditions), placements


def unpack(array: Any, placements: Sequence[Placement]) -> list[np.ndarray]:
    """Takes each segment's tokens out of array[B,N,...]: a list of [n,...], in the order of `placements`."""
    array = np.asarray(array)
    return [array[place.row, place.start : place.start + place.length] for place in placements]


def stream_sequences(
    segments: grain.IterDataset,
    seq_len: int,
    text_len: int,
    max_segments: int,
    num_bins: int = 16,
    segment_conditions: int = 1,
    buckets: bool = False,
) -> grain.IterDataset:
    """Streams sequences, each as the list of the segments that it holds.

    `num_bins` sequences are open at a time (see `bins`); more of them waste fewer positions (experiments/packing), but
    cost memory and, on resuming, the time to read their segments again. The iterator's state is exact. A segment may
    have `segment_conditions` conditions. With `buckets` the segments of a sequence are of one shape.
    """

    def size_of(segment: Segment) -> tuple[int, ...]:
        check_fits(segment, seq_len, text_len, segment_conditions)
        return len(segment.patches), len(segment.text), 1

    kind_of = (lambda segment: segment.shape) if buckets else (lambda segment: None)
    return BestFit(segments, size_of, (seq_len, text_len, max_segments), num_bins, kind_of)


def check_fits(segment: Segment, seq_len: int, text_len: int, conditions: int = 1) -> None:
    """Raises UserError if `segment` is longer than a sequence, has no tokens or too many conditions."""
    n, m = len(segment.patches), len(segment.text)
    if n == 0:
        raise UserError(f"The clip {segment.key!r} has no tokens: leave it out.")
    if n > seq_len or m > text_len:
        raise UserError(
            f"The clip {segment.key!r} has {n} tokens and {m} text tokens, but a sequence holds {seq_len} and "
            f"{text_len}: use longer sequences or a shorter or smaller clip."
        )
    if segment.num_conditions > conditions:
        raise UserError(
            f"The clip {segment.key!r} has {segment.num_conditions} conditions (noise levels, captions), but it may "
            f"have {conditions}: use fewer, or fewer cards in a storyboard."
        )


def _with_conditions(columns: dict[str, np.ndarray], conditions: int) -> PackedBatch:
    """The batch of `columns`, with its conditioning table: an initial σ and an active caption of a segment each."""
    segment_ids, init_sigma = columns["segment_ids"], columns["init_sigma"]
    time = columns.pop("caption_time")
    B = len(segment_ids)
    segments = np.zeros((B, conditions + 1), np.int32)
    times, sigmas = (np.zeros((B, conditions + 1), np.float32) for _ in range(2))
    ids, text_ids = np.zeros_like(segment_ids), np.zeros_like(columns["text_segment_ids"])
    for row in range(B):
        noisy = (segment_ids[row] > 0) & (init_sigma[row] > 0)
        each = np.stack([segment_ids[row], -init_sigma[row], time[row]], axis=-1)[noisy]
        unique, inverse = np.unique(each, axis=0, return_inverse=True)
        used = slice(1, 1 + len(unique))
        ids[row, noisy] = 1 + inverse.reshape(-1)
        segments[row, used], sigmas[row, used], times[row, used] = (
            unique[:, 0],
            -unique[:, 1],
            unique[:, 2],
        )
        same_segment = columns["text_segment_ids"][row][:, None] == segments[row][None, 1:]
        own = same_segment & (columns["text_time"][row][:, None] == times[row][None, 1:])
        # A caption that is active nowhere takes its segment's first condition; that of a conditioning segment takes 0.
        found = np.concatenate([own, same_segment], axis=1) & (np.tile(segments[row, 1:], 2) > 0)
        text_ids[row] = np.where(found.any(1), 1 + found.argmax(1) % conditions, 0)
    return PackedBatch(
        **columns,
        condition_ids=ids,
        text_condition_ids=text_ids,
        condition_segment_ids=segments,
        condition_caption_time=times,
        condition_init_sigma=sigmas,
    )


def _empty_columns(
    like: Segment, batch_size: int, seq_len: int, text_len: int, picture_len: int
) -> dict[str, np.ndarray]:
    lengths = dict.fromkeys(_TOKEN_FIELDS, seq_len) | dict.fromkeys(_TEXT_FIELDS, text_len)
    lengths["pictures"] = picture_len
    columns = {
        name: np.zeros((batch_size, length, *getattr(like, name).shape[1:]), getattr(like, name).dtype)
        for name, length in lengths.items()
        if getattr(like, name) is not None
    }
    ids = {"segment_ids": seq_len, "text_segment_ids": text_len}
    if like.pictures is not None:
        ids["picture_segment_ids"] = picture_len
    return columns | {name: np.zeros((batch_size, length), np.int32) for name, length in ids.items()}
