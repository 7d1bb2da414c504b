"""From pixels to regions that move: the oracle's eyes.

Toyworld's things are saturated and its backgrounds are not, so the part of a pixel's colour that is not grey
says which thing it shows and, where an edge or a blur mixes it with the background, how much of it. Connected
pixels of one colour are a region; regions of one colour that follow one another are a thing. Nothing here sees
the scene.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from sora_jax.toyworld import scene as world

COLOURS = tuple(world.COLOURS)
# Two axes across the grey diagonal of the RGB cube, and where they put the eight colours.
_AXES = (np.array([[2, -1, -1], [0, 1, -1]]) / np.sqrt([[6], [2]])).T.astype(np.float32)
_PALETTE = np.array(list(world.COLOURS.values()), np.float32) @ _AXES
_GREYISH = 40.0  # the most saturated background is at 22, the least saturated thing at 96
_COVER = 0.4  # of a pixel, from which on it counts as a thing's
_CUT = 9.0  # mean change of the background's blocks, in levels: at most 6 within a shot, at least 16 at a cut
_LEAST = 0.0015  # area in squared short sides below which a region is a speck; the smallest thing has 0.014
_SEAM = 0.012  # area up to which a region may be a mere seam


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A clip, pixel by pixel.

    Attributes:
      colour: i[T,Y,X], number of the thing's colour in `COLOURS`, plus 1; 0 is background.
      cover: f32[T,Y,X,8], how much of the pixel a thing of each colour would cover: 0 to 1, and noise.
      patch: i[T,Y,X], number of the connected patch of things; 0 is background.
    """

    colour: np.ndarray
    cover: np.ndarray
    patch: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """What of one colour is connected in one frame, if only through other things in front of it.

    Attributes:
      frame, colour, patch: numbers; of the colour in `COLOURS`.
      area: square pixels. centre: f64[2], (y, x) in pixels.
      edge: it touches the frame's edge.
      clear: it touches neither the edge nor another thing.
      wedged: it touches two other things or more.
    """

    frame: int
    colour: int
    patch: int
    area: float
    centre: np.ndarray
    edge: bool
    clear: bool
    wedged: bool


def segment(frames: np.ndarray) -> Pixels:
    """Tells things from background in a clip uint8[T,Y,X,3]."""
    count, height, width, _ = frames.shape
    plane = (frames.astype(np.float32) @ _AXES).reshape(count, -1, 2)
    grey = (plane**2).sum(-1) < _GREYISH**2
    tint = (plane * grey[..., None]).sum(1) / np.maximum(grey.sum(1), 1)[:, None]
    # Mixed with what is behind it, a colour fades along the line from itself to the background's tint.
    lines = _PALETTE - tint[:, None]
    strength = np.linalg.norm(lines, axis=-1, keepdims=True)
    along = (plane - tint[:, None]) @ (lines / strength).transpose(0, 2, 1)
    hue = along.argmax(-1)
    cover = along / strength.transpose(0, 2, 1)
    thing = np.take_along_axis(cover, hue[..., None], -1)[..., 0] > _COVER
    colour = np.where(thing, hue + 1, 0).reshape(count, height, width)
    return Pixels(colour, cover.reshape(count, height, width, -1), _patches(colour > 0))


def _patches(mask: np.ndarray) -> np.ndarray:
    """Numbers the patches of each frame; a gap of two pixels still joins: a blur may open one in a thin tip."""
    near = np.zeros((3, 3, 3), bool)
    near[1] = True
    wide = ndimage.maximum_filter(mask.astype(np.uint8), (1, 3, 3), mode="constant")
    return ndimage.label(wide, near)[0] * mask


def find_cuts(frames: np.ndarray, pixels: Pixels) -> list[int]:
    """First frames of shots: where the background, averaged over blocks to still its texture, jumps."""
    count, height, width, _ = frames.shape
    block = max(1, min(height, width) // 8)
    rows, columns = height // block, width // block
    shape = (count, rows, block, columns, block)
    seen = pixels.colour[:, : rows * block, : columns * block] == 0
    weight = seen.reshape(shape).sum((2, 4), dtype=np.float32)
    shade = frames[:, : rows * block, : columns * block] * seen[..., None]
    mean = shade.reshape(*shape, 3).sum((2, 4), dtype=np.float32) / np.maximum(weight, 1)[..., None]
    shown = weight > 0.3 * block**2
    both = shown[1:] & shown[:-1]
    change = np.abs(np.diff(mean, axis=0)).max(-1) * both
    change = change.sum((1, 2)) / np.maximum(both.sum((1, 2)), 1)
    # A decoder may smear a cut over neighbouring frames: of a run of jumps the greatest is the cut.
    jumps = np.flatnonzero(change > _CUT)
    runs = np.split(jumps, np.flatnonzero(np.diff(jumps) > 1) + 1) if jumps.size else []
    return [0, *(int(run[change[run].argmax()]) + 1 for run in runs)]


def find_regions(pixels: Pixels) -> list[Region]:
    """All regions of all frames but specks, and seams between things."""
    _, height, width = pixels.colour.shape
    short = min(height, width)
    frame, y, x = np.nonzero(pixels.colour)
    if not frame.size:
        return []
    colour, patch = pixels.colour[frame, y, x] - 1, pixels.patch[frame, y, x]
    keys, which = np.unique(patch * len(COLOURS) + colour, return_inverse=True)
    patches, colours = np.divmod(keys, len(COLOURS))
    size = np.bincount(which)
    frames = np.zeros(len(keys), int)
    frames[which] = frame
    weight = np.clip(pixels.cover[frame, y, x, colour], 0, 1)
    area = np.bincount(which, weight)
    centre = np.stack([np.bincount(which, weight * (v + 0.5)) for v in (y, x)], -1) / area[:, None]
    on_edge = np.bincount(which, (y < 1) | (x < 1) | (y >= height - 1) | (x >= width - 1)) > 0
    # Where two colours meet their mixture may look like a third: a seam, all of it next to other things.
    adjacent = np.zeros(len(keys))
    for t in np.unique(frames[np.bincount(patches)[patches] > 1]):
        high = ndimage.maximum_filter(pixels.colour[t], 5)
        low = ndimage.minimum_filter(np.where(pixels.colour[t] > 0, pixels.colour[t], 99), 5)
        here = frame == t
        adjacent += np.bincount(which[here], (high != low)[y[here], x[here]], len(keys))
    seam = (adjacent > 0.8 * size) & (size < _SEAM * short**2)
    keep = np.flatnonzero((size >= max(_LEAST * short**2, 4)) & ~seam)
    crowd = np.bincount(patches[keep], minlength=patches.max() + 1)[patches]
    return [
        Region(
            int(frames[i]),
            int(colours[i]),
            int(patches[i]),
            float(area[i]),
            centre[i],
            bool(on_edge[i]),
            bool(crowd[i] == 1 and not on_edge[i]),
            bool(crowd[i] > 2),
        )
        for i in keep
    ]


def follow(regions: list[Region], first: int, last: int, short: int) -> list[list[Region]]:
    """Sorts the regions of a shot into things, each a list with at most one region a frame.

    Nearest goes to nearest; what is left over and never shares a frame with a thing of its colour is that
    thing, hidden in between.

    Args:
      first, last: the shot's first frame and the next shot's.
      short: pixels of the short side.
    """
    here = [region for region in regions if first <= region.frame < last]
    least = min(last - first, max(2, 0.2 * (last - first)))
    few = 0.6 * (last - first)
    # A thing is neither a flicker nor a crumb, nor a seam that comes and goes with its two neighbours.
    return [
        sorted(thing, key=lambda region: region.frame)
        for colour in range(len(COLOURS))
        for thing in _join(_chain([region for region in here if region.colour == colour], 0.3 * short))
        if len(thing) >= least and max(region.area for region in thing) > 4 * _LEAST * short**2
        if len(thing) > few or not all(region.wedged for region in thing)
    ]


def _chain(regions: list[Region], reach: float) -> list[list[Region]]:
    """Joins each region to the nearest of the last two frames, no farther than `reach` pixels."""
    chains: list[list[Region]] = []
    for frame in sorted({region.frame for region in regions}):
        here = [region for region in regions if region.frame == frame]
        pairs = sorted(
            (float(np.linalg.norm(chain[-1].centre - region.centre)), i, j)
            for i, chain in enumerate(chains)
            for j, region in enumerate(here)
            if frame - chain[-1].frame <= 2
        )
        used: set[int] = set()
        for gap, i, j in pairs:
            if gap < reach and j not in used and chains[i][-1].frame < frame:
                chains[i].append(here[j])
                used.add(j)
        chains += [[region] for j, region in enumerate(here) if j not in used]
    return chains


def _join(chains: list[list[Region]]) -> list[list[Region]]:
    things: list[list[Region]] = []
    for chain in sorted(chains, key=lambda chain: -sum(region.area for region in chain)):
        frames = {region.frame for region in chain}
        apart = (thing for thing in things if frames.isdisjoint(region.frame for region in thing))
        thing = next(apart, None)
        if thing is None:
            things.append(list(chain))
        else:
            thing += chain
    return things
