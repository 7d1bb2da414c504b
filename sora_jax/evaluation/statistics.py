"""Statistics of a reference set, kept: moments of features, with what they were made of."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError, atomic_path, user_path
from sora_jax.evaluation.clips import ClipFile, ClipSettings, describe_shape, describe_shapes
from sora_jax.evaluation.extractors import Extractor
from sora_jax.evaluation.frechet import Moments
from sora_jax.evaluation.provenance import made_by
from sora_jax.media.digests import value_digest

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a set of clips.

    Attributes:
      moments: by metric ("fvd", "fid").
      provenance: `clips` (how many), `clip` (frames, height, width, fps), `source` (folder's name and digest of its
        contents), `features` by metric (name, version, label, rows), `made_by`.
    """

    moments: Mapping[str, Moments]
    provenance: Mapping[str, Any]


def provenance_of(folder: str, clips: Sequence[ClipFile], settings: ClipSettings) -> dict[str, Any]:
    """What a set of clips is: how many, of which shape, from where."""
    shapes = {(clip.size, clip.fps) for clip in clips}
    ((height, width), fps) = next(iter(shapes)) if len(shapes) == 1 else ((None, None), None)
    return {
        "clips": len(clips),
        "clip": {"frames": settings.frames, "height": height, "width": width, "fps": fps},
        "source": {
            "folder": pathlib.Path(folder).resolve().name,
            "digest": value_digest([[clip.digest, clip.start] for clip in clips]),
        },
    }


def save_statistics(
    path: str | os.PathLike[str],
    moments: Mapping[str, Moments],
    extractors: Mapping[str, Extractor],
    provenance: Mapping[str, Any],
) -> None:
    """Writes an `.npz` of moments with their provenance.

    Raises:
      UserError: it can't be written.
    """
    features = {
        metric: {
            "name": extractors[metric].name,
            "version": extractors[metric].version,
            "label": extractors[metric].label,
            "rows": each.count,
        }
        for metric, each in moments.items()
    }
    told = {"format": FORMAT, **provenance, "features": features, "made_by": made_by()}
    arrays = {"provenance": np.frombuffer(json.dumps(told).encode(), np.uint8)}
    for metric, each in moments.items():
        arrays |= {f"{metric}/mean": each.mean, f"{metric}/scatter": each.scatter}
    with atomic_path(user_path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: str | os.PathLike[str], extractors: Mapping[str, Extractor]) -> Statistics:
    """Reads what `save_statistics` wrote.

    Args:
      path: the file.
      extractors: by metric, those that the other set is measured with.

    Raises:
      UserError: the file is damaged or another kind, has no statistics for a metric, or they were made with another
        extractor or another version of it.
    """
    path = user_path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            told = json.loads(file["provenance"].tobytes())
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: check the name.") from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} can't be read as statistics of a reference ({error}): make it with sora-jax evaluate videos "
            "FOLDER --save-statistics."
        ) from error
    if told.get("format") != FORMAT:
        raise UserError(f"{path} is of format {told.get('format')}, and {FORMAT} is read: make it again.")
    moments = {}
    for metric, extractor in extractors.items():
        made = told["features"].get(metric)
        if made is None:
            there = ", ".join(told["features"])
            raise UserError(
                f"{path} has statistics for {there} alone: make it again with --metrics {metric} too."
            )
        if (made["name"], made["version"]) != (extractor.name, extractor.version):
            raise UserError(
                f"{path} was made with {made['name']}, version {made['version']}, and the clips are measured with "
                f"{extractor.name}, version {extractor.version}: a distance between them means nothing; make it again "
                "with these features."
            )
        moments[metric] = Moments(made["rows"], arrays[f"{metric}/mean"], arrays[f"{metric}/scatter"])
    return Statistics(moments, {key: told.get(key) for key in ("clips", "clip", "source", "made_by")})


def check_shape(statistics: Statistics, path: str, clips: Sequence[ClipFile], settings: ClipSettings) -> None:
    """Raises UserError where the clips have another shape or rate than those of the statistics."""
    kept = statistics.provenance["clip"]
    own = provenance_of("", clips, settings)["clip"]
    if kept == own:
        return
    size, fps = (kept["height"], kept["width"]), kept["fps"]
    raise UserError(
        f"{path} is of clips of {kept['frames']} frames, {describe_shape(size, fps)}, and these are of "
        f"{settings.frames} frames, {describe_shapes(clips)}: pass --frames {kept['frames']} --size "
        f"{size[1]}x{size[0]}" + (f" --fps {fps:g}" if fps else "") + " to bring them to that."
    )
