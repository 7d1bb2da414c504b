"""Figures of a folder from what its clips gave: means and distances with intervals, and what must be said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation import frechet, intervals
from sora_jax.evaluation.catalogue import METRICS
from sora_jax.evaluation.clips import ClipFile, describe_shapes
from sora_jax.evaluation.extractors import Extractor
from sora_jax.evaluation.frechet import Moments
from sora_jax.evaluation.measure import Row
from sora_jax.evaluation.metrics import MS_SSIM_WEIGHTS, ms_ssim_scales
from sora_jax.evaluation.statistics import Statistics


def check_enough(
    sets: Mapping[str, Extractor], clips: int, others: int | None, image_frames: int, frames: int, few: bool
) -> None:
    for name, extractor in sets.items():
        rows = min(image_frames, frames) if extractor.kind == "image" else 1
        least = 2 if few else -(-frechet.least_rows(extractor.width) // rows)
        for number, which in ((clips, "there are"), (others, "the reference has")):
            if number is not None and number < least:
                accept = "" if few else ", or accept a figure that is too high and say so with --few"
                raise UserError(
                    f"{METRICS[name].title} of {extractor.width} features needs at least {least} clips for its "
                    f"covariance, and {which} {number}: add clips{accept}."
                )


def distance(
    name: str,
    own: Sequence[Row],
    moments: Moments,
    kept: Statistics,
    seed: int,
    replicates: int | None,
    extractor: Extractor,
) -> dict[str, Any]:
    features = np.stack([row.features[name] for row in own])
    low = high = interval = None
    if replicates != 0:
        low, high, drawn = frechet.frechet_interval(features, kept.moments[name], seed, replicates)
        interval = f"bootstrap of clips, {drawn} replicates, around the figure"
    return {
        "value": frechet.frechet_distance(moments, kept.moments[name]),
        "low": low,
        "high": high,
        "clips": len(own),
        "rows": moments.count,
        "reference_clips": kept.provenance["clips"],
        "features": extractor.name,
        "interval": interval,
    }


def mean(name: str, figures: Sequence[float], seed: int, replicates: int | None) -> dict[str, Any]:
    values = np.array(figures)
    kept = values[np.isfinite(values)]
    told: dict[str, Any] = {"value": float(kept.mean()) if len(kept) else None, "clips": len(values)}
    if METRICS[name].unit == "share":
        low, high = intervals.share_interval(int(kept.sum()), len(kept))
        return told | {"low": low, "high": high, "interval": "Wilson's"}
    number = intervals.REPLICATES if replicates is None else replicates
    found = intervals.mean_interval(kept, seed, number) if number else None
    told |= {"low": found[0] if found else None, "high": found[1] if found else None}
    told["interval"] = f"bootstrap of clips, {number} replicates" if found else None
    return told | ({"lossless": len(values) - len(kept)} if len(kept) < len(values) else {})


def remarks(
    names: Sequence[str],
    clips: Sequence[ClipFile],
    sets: Mapping[str, Extractor],
    results: Mapping[str, Any],
    image_frames: int,
) -> Iterator[str]:
    """What differs from the standard protocols, and what a reader of the figures must know."""
    if len({(clip.size, clip.fps) for clip in clips}) > 1:
        yield f"The clips differ in size or rate ({describe_shapes(clips)}): figures are means over all."
    for name, extractor in sets.items():
        told, metric = results.get(name), METRICS[name]
        if told is None:
            continue
        least = frechet.least_rows(extractor.width)
        if told["rows"] < least:
            yield (
                f"{metric.title} of {told['rows']} rows of {extractor.width} features is too high: the covariance is "
                "singular."
            )
        usual = "clips" if extractor.kind == "video" else "pictures"
        if told["rows"] < metric.usual:
            yield (
                f"{metric.title} is of {told['rows']} {usual}; published figures are of {metric.usual:,}, and lower "
                "for it."
            )
        if extractor.kind == "image":
            yield f"{metric.title} is of {image_frames} frames of each clip."
    if "ms_ssim" in names:
        scales = {len(ms_ssim_scales(*clip.size)) for clip in clips}
        if scales != {len(MS_SSIM_WEIGHTS)}:
            listed = " or ".join(map(str, sorted(scales)))
            yield (
                f"MS-SSIM is of {listed} scales, not of five, for which frames of at least 176 x 176 pixels are needed."
            )
    if {"warping_error", "motion_magnitude", "dynamic_degree"} & set(names):
        yield "Optical flow is Lucas and Kanade's, where published figures take that of RAFT or FlowNet2."
    for name, standard in (("subject_consistency", "DINO"), ("background_consistency", "CLIP")):
        told = results.get(name)
        if told and not told["label"].startswith(standard):
            yield f"{METRICS[name].title.capitalize()} is of {told['label']}; VBench takes {standard}'s."
