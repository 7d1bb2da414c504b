"""Clips to rows and back: patches, coordinates, and the packed batch (NaViT's patch n' pack)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np

from sora_jax.errors import UserError

Grid = tuple[int, int, int]
CoordinateMode = Literal["fractional", "absolute"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows of fixed length that hold many runs each. An array may be NumPy's or JAX's.

    Attributes:
      patches: float[B,N,P], clean latent patches.
      coords: float[B,N,3], time in seconds, y, x as they enter RoPE.
      segment_ids: int32[B,N], 1…K in order of place; 0 is an empty slot.
      given: bool[B,N], conditioning tokens: σ = 0, no loss.
      text: float[B,M,E], states of the text encoder.
      text_segment_ids: int32[B,M], as above; a run without words has no slot here.
      text_time: float[B,M], seconds from which these words hold; 0 is the whole clip.
    """

    patches: Any
    coords: Any
    segment_ids: Any
    given: Any
    text: Any
    text_segment_ids: Any
    text_time: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One clip and its words, as tokens.

    Attributes:
      patches: float[n,P].
      coords: float32[n,3], see `coordinates`.
      given: bool[n].
      text: float[m,E]; m may be 0.
      text_time: float[m], seconds.
      key: names the clip, in errors.
    """

    patches: np.ndarray
    coords: np.ndarray
    given: np.ndarray
    text: np.ndarray
    text_time: np.ndarray
    key: str = ""


class Placement(NamedTuple):
    """Where a run lies: slots start…start+length of `row`, under the id `segment` (1…K)."""

    row: int
    segment: int
    start: int
    length: int


def patchify(latent: np.ndarray, patch: Grid) -> np.ndarray:
    """Cuts latent[t,y,x,c] into patches [n,P]: n runs over (t, y, x), P over (pt, py, px, c), last fastest.

    Raises:
      UserError: a side of the latent is no multiple of the patch's.
    """
    (t, y, x), (pt, py, px) = _patch_grid(latent.shape[:3], patch), patch
    blocks = latent.reshape(t, pt, y, py, x, px, latent.shape[3])
    return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(t * y * x, -1)


def unpatchify(patches: np.ndarray, grid: Grid, patch: Grid) -> np.ndarray:
    """Undoes `patchify`: [n,P] to latent[t,y,x,c], where `grid` is the latent's (t, y, x)."""
    (t, y, x), (pt, py, px) = _patch_grid(grid, patch), patch
    blocks = patches.reshape(t, y, x, pt, py, px, -1)
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(*grid, -1)


def coordinates(
    grid: Grid, patch: Grid, fps: float, frames_per_latent: int = 4, mode: CoordinateMode = "fractional"
) -> np.ndarray:
    """Returns float32[n,3]: time, y and x of the centre of each patch of a latent of size `grid` (t, y, x).

    Time is in seconds. Latent frame j ends with video frame `frames_per_latent`·j, so its time is that over `fps`;
    the first is one frame at 0, as an image is. A patch of several latent frames takes their mean.

    "absolute": y and x count patches from the top left corner: 0, 1, 2, … A patch always spans one unit, so a
    picture at twice the resolution is twice as wide.

    "fractional": y and x are measured from the centre of the frame (y down, x right) in units of its short side,
    as in Toyworld: the same picture has the same coordinates at every resolution. NaViT divides each side by its
    own length instead, and every frame becomes a unit square; one unit for both sides keeps squares square, so
    the model sees the aspect ratio, and a wider frame only adds coordinates beside the ones it knew.
    """
    if not fps > 0:
        raise UserError(f"A clip can't have {fps} frames per second: give a positive number.")
    axes = [np.arange(count, dtype=np.float64) for count in _patch_grid(grid, patch)]
    axes[0] = (axes[0] * patch[0] + (patch[0] - 1) / 2) * frames_per_latent / fps
    if mode == "fractional":
        short_side = min(grid[1:])
        for axis in (1, 2):
            axes[axis] = ((axes[axis] + 0.5) * patch[axis] - grid[axis] / 2) / short_side
    elif mode != "absolute":
        raise UserError(f'Coordinates are "fractional" or "absolute", not "{mode}".')
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float32)


def pack_rows(
    runs: Sequence[Run], row_tokens: int, row_text: int, max_runs: int, rows: int | None = None
) -> tuple[PackedBatch, list[Placement]]:
    """Packs a finite list of runs into few rows (first-fit decreasing), in NumPy.

    Args:
      runs: at least one; all with the same P and E.
      row_tokens: N, token slots a row.
      row_text: M, text slots a row.
      max_runs: K, the most runs a row may hold.
      rows: pads with empty rows to exactly this many, for a shape that is known beforehand.

    Returns:
      The batch and one placement per run, in the order of `runs`, for `unpack`.

    Raises:
      UserError: there is no run, one is longer than a row, or `rows` are too few.
    """
    if not runs:
        raise UserError("There is nothing to pack: give at least one run.")
    for run in runs:
        check_fits(run, row_tokens, row_text)
    sizes = [(len(run.patches), len(run.text)) for run in runs]
    order = sorted(
        range(len(runs)), key=lambda i: -max(sizes[i][0] / row_tokens, sizes[i][1] / max(row_text, 1))
    )
    used: list[list[int]] = []  # tokens, text and runs of each row
    placements: dict[int, Placement] = {}
    text_starts: dict[int, int] = {}
    for i in order:
        n, m = sizes[i]
        fitting = (
            row
            for row, (tokens, text, count) in enumerate(used)
            if tokens + n <= row_tokens and text + m <= row_text and count < max_runs
        )
        row = next(fitting, len(used))
        if row == len(used):
            used.append([0, 0, 0])
        tokens, text, count = used[row]
        placements[i], text_starts[i] = Placement(row, count + 1, tokens, n), text
        used[row] = [tokens + n, text + m, count + 1]
    if rows is not None and len(used) > rows:
        raise UserError(
            f"{len(runs)} runs need {len(used)} rows, but there are {rows}: give more or longer rows."
        )

    batch = _empty_batch(runs[0], rows or len(used), row_tokens, row_text)
    for i, run in enumerate(runs):
        row, segment, start, n = placements[i]
        slots, words = slice(start, start + n), slice(text_starts[i], text_starts[i] + len(run.text))
        batch.patches[row, slots] = run.patches
        batch.coords[row, slots] = run.coords
        batch.given[row, slots] = run.given
        batch.segment_ids[row, slots] = segment
        batch.text[row, words] = run.text
        batch.text_time[row, words] = run.text_time
        batch.text_segment_ids[row, words] = segment
    return batch, [placements[i] for i in range(len(runs))]


def unpack(array: Any, placements: Sequence[Placement]) -> list[np.ndarray]:
    """Takes each run's tokens out of array[B,N,...]: a list of [n,...], in the order given to `pack_rows`."""
    array = np.asarray(array)
    return [array[place.row, place.start : place.start + place.length] for place in placements]


def pack_stream(
    runs: grain.IterDataset, row_tokens: int, row_text: int, max_runs: int, rows: int, window: int = 64
) -> grain.IterDataset:
    """Packs a stream of `Run`s into a stream of PackedBatch (NumPy), with Grain's first-fit packer.

    `window` rows are open at a time and close together once a run fits none of them; more rows waste fewer slots
    (64 fill 98–99.9%) and cost memory and, on resuming, the time to pack them again. The iterator's state is exact.
    A finite stream ends with empty rows that complete its last batch.
    """
    length = dict.fromkeys(("patches", "coords", "given"), row_tokens)
    length |= dict.fromkeys(("text", "text_time"), row_text)

    def features(run: Run) -> dict[str, np.ndarray]:
        check_fits(run, row_tokens, row_text)
        return {field: getattr(run, field) for field in length}

    packed = grain.experimental.FirstFitPackIterDataset(
        runs.map(features),
        length_struct=length,
        num_packing_bins=window,
        max_sequences_per_bin=max_runs,
        shuffle_bins=False,
    )

    def collate(packed_rows: Sequence[dict[str, np.ndarray]]) -> PackedBatch:
        columns = grain.experimental.batch_and_pad(packed_rows, batch_size=rows)
        return PackedBatch(
            segment_ids=columns["patches_segment_ids"],
            text_segment_ids=columns["text_segment_ids"],
            **{field: columns[field] for field in length},
        )

    return packed.batch(rows, batch_fn=collate)


def check_fits(run: Run, row_tokens: int, row_text: int) -> None:
    """Raises UserError if `run` is longer than a row, or has no tokens."""
    n, m = len(run.patches), len(run.text)
    if n == 0:
        raise UserError(f"The run {run.key!r} has no tokens: leave it out.")
    if n > row_tokens or m > row_text:
        raise UserError(
            f"The run {run.key!r} has {n} tokens and {m} text tokens, but a row holds {row_tokens} and {row_text}: "
            "use longer rows or a shorter or smaller clip."
        )


def _patch_grid(grid: Sequence[int], patch: Grid) -> Grid:
    if any(size < 1 or size % side for size, side in zip(grid, patch, strict=True)):
        raise UserError(
            f"A latent of {_by(grid)} (time, height, width) can't be cut into patches of {_by(patch)}."
        )
    t, y, x = (size // side for size, side in zip(grid, patch, strict=True))
    return t, y, x


def _by(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _empty_batch(like: Run, rows: int, row_tokens: int, row_text: int) -> PackedBatch:
    return PackedBatch(
        patches=np.zeros((rows, row_tokens, like.patches.shape[1]), like.patches.dtype),
        coords=np.zeros((rows, row_tokens, 3), np.float32),
        segment_ids=np.zeros((rows, row_tokens), np.int32),
        given=np.zeros((rows, row_tokens), bool),
        text=np.zeros((rows, row_text, like.text.shape[1]), like.text.dtype),
        text_segment_ids=np.zeros((rows, row_text), np.int32),
        text_time=np.zeros((rows, row_text), np.float32),
    )
