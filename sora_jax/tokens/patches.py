"""Latents to tokens and back: patches, the boxes they cover, and the conditioning patches at their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sora_jax.axes import ClipLatent, ClipPatches, References, Seconds, TimePatches, TimeSigma
from sora_jax.errors import UserError

Grid = tuple[int, int, int]

CoordinateMode = Literal["fractional", "absolute", "normalized", "latent"]


def patchify(latent: ClipLatent, patch: Grid) -> ClipPatches:
    """Cuts latent[t,y,x,c] into patches [n,P]: n runs over (t, y, x), P over (pt, py, px, c), last fastest.

    Raises:
      UserError: a side of the latent is no multiple of the patch's.
    """
    (t, y, x), (pt, py, px) = _patch_grid(latent.shape[:3], patch), patch
    blocks = latent.reshape(t, pt, y, py, x, px, latent.shape[3])
    return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(t * y * x, -1)


def unpatchify(patches: ClipPatches, grid: Grid, patch: Grid) -> ClipLatent:
    """Undoes `patchify`: [n,P] to latent[t,y,x,c], where `grid` is the latent's (t, y, x)."""
    (t, y, x), (pt, py, px) = _patch_grid(grid, patch), patch
    blocks = patches.reshape(t, y, x, pt, py, px, -1)
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(*grid, -1)


def coordinates(
    grid: Grid,
    patch: Grid,
    fps: float,
    frames_per_latent: int = 4,
    mode: CoordinateMode = "fractional",
    ends: Sequence[int] | np.ndarray | None = None,
    first: Sequence[bool] | np.ndarray | None = None,
    corner: tuple[int, int] = (0, 0),
    frame: tuple[int, int] | None = None,
) -> np.ndarray:
    """Returns float32[n,5]: the box that each patch of a latent of size `grid` (t, y, x) covers.

    The first three are its time, y and x, which enter RoPE; the last two its extent: the seconds from the last video
    frame before it to its own last (four frames' for a group of four; 0 for a frame that stands alone), and its height
    in the units of y. They distinguish frame rates, single frames and resolutions.

    Time is in seconds. Latent frame j ends with video frame `ends[j]`, so its time is that over `fps`; a patch of
    several latent frames takes their mean.

    "absolute": y and x count patches from the top left corner: 0, 1, 2, … A patch always spans one unit, so a
    picture at twice the resolution is twice as wide.

    "fractional": y and x are measured from the centre of the frame (y down, x right) in units of its short side,
    as in Toyworld: the same picture has the same coordinates at every resolution. NaViT divides each side by its
    own length instead, and every frame becomes a unit square; one unit for both sides keeps squares square, so
    the model sees the aspect ratio, and a wider frame only adds coordinates next to the known ones.

    "normalized": that of NaViT (Dehghani et al. 2023): each side from −1/2 to 1/2, whatever its length.

    "latent": as "absolute", and time counts patches too, 0, 1, 2, … for a whole clip, whatever its rate (Wan).

    Args:
      ends: the last video frame of each latent frame; None is a whole clip's: 0, and then every
        `frames_per_latent`-th.
      first: latent frames that show one video frame alone; None is a whole clip's: the first.
      corner, frame: the position of this latent in a larger frame (top, left), and that one's (height, width), in
        cells.
    """
    if not fps > 0:
        raise UserError(f"A clip can't have {fps} frames per second: give a positive number.")
    t, y, x = _patch_grid(grid, patch)
    last = np.arange(grid[0]) * frames_per_latent if ends is None else np.asarray(ends)
    alone = np.arange(grid[0]) == 0 if first is None else np.asarray(first)
    begin = last - np.where(alone, 0, frames_per_latent)
    time = last.reshape(t, patch[0]).mean(1) / fps
    span = (last.reshape(t, patch[0]).max(1) - begin.reshape(t, patch[0]).min(1)) / fps
    if mode == "latent":
        time = last.reshape(t, patch[0])[:, 0] / (frames_per_latent * patch[0])
    frame = frame or (grid[1], grid[2])
    centred = (corner[0] - frame[0] / 2, corner[1] - frame[1] / 2)
    if mode == "fractional":
        tall = wide = float(min(frame))
        offset = centred
    elif mode == "normalized":
        (tall, wide), offset = map(float, frame), centred
    elif mode in ("absolute", "latent"):
        (tall, wide), offset = map(float, patch[1:]), (corner[0] - patch[1] / 2, corner[1] - patch[2] / 2)
    else:
        raise UserError(f'Coordinates are "fractional", "absolute", "normalized" or "latent", not "{mode}".')
    rows, columns = (
        (np.arange(count) + 0.5) * side + shift
        for count, side, shift in zip((y, x), patch[1:], offset, strict=True)
    )
    centre = np.stack(np.meshgrid(time, rows / tall, columns / wide, indexing="ij"), axis=-1)
    extent = np.broadcast_to(np.stack([span, np.full(t, patch[1] / tall)], -1)[:, None, None], (t, y, x, 2))
    return np.concatenate([centre, extent], axis=-1).reshape(-1, 5).astype(np.float32)


def reference_patches(patches: TimePatches, init_sigma: TimeSigma, time: Seconds) -> References:
    """For each token the conditioning patches at its (y, x), latest before it and earliest after it.

    Args:
      patches: float[t,m,P]: m positions, t times.
      init_sigma: float[t,m]; 0 is conditioning.
      time: float[t], seconds, in the order of the latent frames.

    Returns:
      float32[t,m,2(P+1)]: each of the two as a patch and its nearness, exp(−seconds between); zeros where there is
      none, and for conditioning tokens themselves.
    """
    t, m, width = patches.shape
    out = np.zeros((t, m, 2, width + 1), np.float32)
    for side, order in enumerate((range(t), range(t - 1, -1, -1))):
        last = np.full(m, -1)
        for j in order:
            known = last >= 0
            out[j, known, side, :width] = patches[last[known], known]
            out[j, known, side, width] = np.exp(-np.abs(time[j] - time[last[known]]))
            last = np.where(init_sigma[j] == 0, j, last)
    out[init_sigma == 0] = 0
    return out.reshape(t, m, -1)


def _patch_grid(grid: Sequence[int], patch: Grid) -> Grid:
    if any(size < 1 or size % side for size, side in zip(grid, patch, strict=True)):
        raise UserError(
            f"A latent of {_by(grid)} (time, height, width) can't be cut into patches of {_by(patch)}."
        )
    t, y, x = (size // side for size, side in zip(grid, patch, strict=True))
    return t, y, x


def _by(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
