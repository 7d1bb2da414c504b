"""A folder of videos measured, ours or another model's: `sora-jax evaluate videos`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError, user_path
from sora_jax.evaluation import frechet
from sora_jax.evaluation.catalogue import METRICS, choose, of_pairs, of_sets
from sora_jax.evaluation.clips import ClipFile, ClipSettings, check_alike, describe_shapes, list_clips
from sora_jax.evaluation.extractors import Extractor
from sora_jax.evaluation.frechet import Moments
from sora_jax.evaluation.measure import IMAGE_FRAMES, Measurer, Row
from sora_jax.evaluation.parts import Parts
from sora_jax.evaluation.provenance import made_by
from sora_jax.evaluation.statistics import (
    Statistics,
    check_shape,
    load_statistics,
    provenance_of,
    save_statistics,
)
from sora_jax.evaluation.stream import ClipJob, Progress, measure_jobs
from sora_jax.evaluation.summary import check_enough, distance, mean, remarks


def evaluate_videos(
    folder: str | os.PathLike[str],
    metrics: Sequence[str] = (),
    reference: str | os.PathLike[str] | None = None,
    clip: ClipSettings | None = None,
    features: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    image_frames: int = IMAGE_FRAMES,
    shard: tuple[int, int] = (1, 1),
    parts: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    few: bool = False,
    seed: int = 0,
    replicates: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of the clips of a folder, with intervals; streamed, so memory doesn't grow with how many there are.

    Args:
      folder: of videos, pictures or arrays, with subfolders.
      metrics: of `catalogue.METRICS`; none: those that need nothing more than is given.
      reference: a folder to compare with, as sets or clip by clip (the one of the same name), or statistics of one
        that `statistics` wrote.
      clip: what of each file is a clip, and what it is brought to; None: `ClipSettings()`.
      features: by metric, an extractor to take instead of its own (`extractors.EXTRACTORS`).
      weights: local weights by extractor, or of "lpips" or "clip".
      image_frames: how many of a clip's frames, spread evenly, distances of images take.
      shard: (i, n): measure the i-th of n parts of the clips, from 1; the figures come of a call without it.
      parts: a folder in which what was measured is kept, so that an interrupted call goes on and shards meet; None
        keeps it until the call ends.
      statistics: write the folder's own statistics here, as a reference for others.
      few: measure distances of sets of fewer clips than their covariance needs, too.
      seed: of the bootstrap.
      replicates: of it; None takes 1,000 for means, and for distances of sets what is affordable.
      progress: called with (clips done, in all).

    Returns:
      `metrics` (by name: `value`, the 95% interval `low` to `high`, `clips`, what it is and was made with), `clips`
      (each one's figures), `notes`, `settings`, `made_by`; of a shard of several `shard`, `measured`, `of` alone.

    Raises:
      UserError: something asked for is unknown or missing, clips are too few, too short, too small or differ where
        they must not, or hold values that are no numbers.
    """
    clip = clip or ClipSettings()
    names = choose(metrics, reference is not None)
    index, shards = shard
    if not 1 <= index <= shards:
        raise UserError(
            f"Shard {index} of {shards} can't be measured: shards are counted from 1 to {shards}."
        )
    if shards > 1 and parts is None:
        raise UserError("A shard's parts need a folder that all shards share: name it with --parts.")
    _check_reference(names, reference, statistics)
    measurer = Measurer(names, features or {}, weights or {}, image_frames)
    sets = {name: measurer.extractors[name] for name in of_sets(names)}
    clips = list_clips(folder, clip, captions="clip_score" in names)
    kept, others = _reference(reference, clip, sets)
    paired = _pair(clips, others, str(reference)) if of_pairs(names) else dict.fromkeys(clips)
    if compared := [name for name in names if METRICS[name].reference]:
        check_alike(clips, others, compared)
    if kept:
        check_shape(kept, str(reference), clips, clip)
    check_enough(sets, len(clips), len(others) if others else None, image_frames, clip.frames, few)
    own = [ClipJob(each, paired[each]) for each in clips]
    theirs = [ClipJob(each, of_reference=True) for each in others] if sets else []
    jobs = [*own, *theirs]
    settings = {
        "metrics": list(names),
        **dataclasses.asdict(clip),
        "image_frames": image_frames if "fid" in names else None,
        "versions": {name: told["version"] for name, told in measurer.provenance.items()},
    }
    with contextlib.ExitStack() as stack:
        place = parts or stack.enter_context(tempfile.TemporaryDirectory())
        store = Parts(user_path(place), settings)
        mine = jobs[index - 1 :: shards]
        rows, notes = store.read(job.key for job in jobs), []
        if before := sum(job.key in rows for job in mine):
            notes.append(
                f"{before} of {len(mine)} clips had been measured before: they were taken from {place}."
            )
        notes += measure_jobs(mine, rows, measurer, clip, store, progress or (lambda done, of: None))
    if shards > 1:
        told = {"shard": index, "shards": shards, "measured": len(mine), "of": len(jobs), "notes": notes}
        return {"evaluation": "videos", **told, "made_by": made_by()}
    found = [rows[job.key] for job in own]
    moments = _moments(found, sets)
    if statistics is not None:
        save_statistics(statistics, moments, sets, provenance_of(str(folder), clips, clip))
    if theirs:
        there = _moments([rows[job.key] for job in theirs], sets)
        kept = Statistics(there, provenance_of(str(reference), others, clip))
    results: dict[str, Any] = {}
    for name in names:
        if name not in sets:
            results[name] = mean(name, [row.figures[name] for row in found], seed, replicates)
        elif kept is not None:
            results[name] = distance(name, found, moments[name], kept, seed, replicates, sets[name])
        if name in results and name in measurer.provenance:
            results[name] |= {key: measurer.provenance[name][key] for key in ("label", "version")}
    against = {"folder": pathlib.Path(reference).name} if reference is not None else None
    return {
        "evaluation": "videos",
        "folder": pathlib.Path(folder).resolve().name,
        "reference": kept.provenance if kept else against,
        "settings": settings | {"seed": seed, "clips": len(clips), "shapes": describe_shapes(clips)},
        "metrics": results,
        "clips": [
            {"file": each.name, "start": each.start}
            | {name: value if np.isfinite(value) else None for name, value in row.figures.items()}
            for each, row in zip(clips, found, strict=True)
        ],
        "notes": [*notes, *remarks(names, clips, sets, results, image_frames)],
        "made_by": made_by(),
    }


def _moments(rows: Sequence[Row], sets: Mapping[str, Extractor]) -> dict[str, Moments]:
    """By metric, in the order of the clips: the same however they were measured."""
    return {name: frechet.in_blocks(np.concatenate([row.features[name] for row in rows])) for name in sets}


def _check_reference(
    names: Sequence[str], reference: str | os.PathLike[str] | None, statistics: str | os.PathLike[str] | None
) -> None:
    pairs, sets = of_pairs(names), of_sets(names)
    if pairs and (reference is None or not user_path(reference).is_dir()):
        raise UserError(
            f"{', '.join(pairs)} compare each clip with the one of the same name: name their folder with --reference."
        )
    if sets and reference is None and statistics is None:
        raise UserError(
            f"{', '.join(sets)} compare sets of clips: name the other folder, or its statistics, with --reference."
        )
    if statistics is not None and not sets:
        raise UserError("Statistics are of metrics that compare sets: ask for fvd or fid in --metrics.")
    if reference is not None and not pairs and not sets:
        raise UserError(
            f"None of {', '.join(names)} compares with a reference: leave --reference out, or ask for fvd."
        )


def _reference(
    reference: str | os.PathLike[str] | None,
    settings: ClipSettings,
    sets: Mapping[str, Extractor],
) -> tuple[Statistics | None, list[ClipFile]]:
    """Kept statistics, or the clips of a folder."""
    if reference is None:
        return None, []
    if user_path(reference).is_dir():
        return None, list_clips(reference, settings)
    return load_statistics(reference, sets), []


def _pair(
    clips: Sequence[ClipFile], others: Sequence[ClipFile], reference: str
) -> dict[ClipFile, ClipFile | None]:
    """Each clip with that of the reference of its name and place.

    Raises:
      UserError: one has none.
    """
    there = {(other.stem, other.start): other for other in others}
    alone = [clip.name for clip in clips if (clip.stem, clip.start) not in there]
    if alone:
        shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
        raise UserError(
            f"{len(alone)} of {len(clips)} clips have none of their name in {reference}: {shown}; metrics that compare "
            "clip with clip pair files by their names."
        )
    return {clip: there[clip.stem, clip.start] for clip in clips}
