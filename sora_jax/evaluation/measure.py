"""Clips to figures, batch by batch: of each clip one number a metric, and the features that sets are compared by."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers

from sora_jax.errors import UserError, user_path
from sora_jax.evaluation import metrics, temporal
from sora_jax.evaluation.catalogue import METRICS, of_sets, with_features
from sora_jax.evaluation.extractors import Extractor, load_clip, load_extractor
from sora_jax.evaluation.metrics import frame_blocks
from sora_jax.evaluation.networks import lpips, transformers
from sora_jax.evaluation.networks.layers import loaded
from sora_jax.evaluation.optical_flow import optical_flow
from sora_jax.media.digests import array_digest
from sora_jax.media.video import evenly_spread

IMAGE_FRAMES = 4  # of a clip, for distances of images
TextScore = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one clip gave: a number a metric, and rows f32[G,D] of features by the metric that compares sets."""

    figures: Mapping[str, float]
    features: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Clips of one shape and rate, with what is computed of them once.

    Attributes:
      clips: uint8[B,T,Y,X,3].
      references: the same shape, or None.
      captions: one for each clip.
      fps: None where the clips tell none.
    """

    clips: np.ndarray
    references: np.ndarray | None
    captions: Sequence[str]
    fps: float | None
    _kept: dict[Any, np.ndarray] = dataclasses.field(default_factory=dict)

    def flow(self, step: int, backward: bool = False) -> np.ndarray:
        """f32[B,P,Y,X,2] of every `step`-th frame and the next such, or back."""
        key = ("flow", step, backward)
        if key not in self._kept:
            sampled = self.clips[:, ::step]
            pairs = [part.reshape(-1, *part.shape[2:]) for part in (sampled[:, :-1], sampled[:, 1:])]
            flow = optical_flow(*reversed(pairs)) if backward else optical_flow(*pairs)
            self._kept[key] = flow.reshape(*sampled[:, 1:].shape[:4], 2)
        return self._kept[key]

    def features(self, extractor: Extractor, frames: int | None = None) -> np.ndarray:
        """f32[B,G,D]; of `frames` frames of each clip, spread evenly, or of all."""
        if ("features", extractor.version) in self._kept:
            rows = self._kept["features", extractor.version]
            chosen = self._chosen(frames) if extractor.kind == "image" else slice(None)
            return rows[:, chosen]
        if frames is not None and extractor.kind == "image":
            return extractor(self.clips[:, self._chosen(frames)])
        rows = self._kept["features", extractor.version] = extractor(self.clips)
        return rows

    def _chosen(self, frames: int | None) -> np.ndarray:
        return evenly_spread(self.clips.shape[1], frames or self.clips.shape[1])


class Measurer:
    """Metrics with the networks that they need.

    Attributes:
      names: of the metrics.
      extractors: by metric, of those that are made of features.
      provenance: what figures depend on besides the clips: versions of features and weights.
    """

    def __init__(
        self, names: Sequence[str], features: Mapping[str, str], weights: Mapping[str, str], image_frames: int
    ) -> None:
        """Loads what the metrics need.

        Args:
          names: of `catalogue.METRICS`.
          features: by metric, the extractor to take instead of its own.
          weights: paths of local weights, by extractor, "lpips" or "clip".
          image_frames: of each clip, for distances of images.

        Raises:
          UserError: a name is unknown, or weights are missing or others.
        """
        self.names, self.image_frames = tuple(names), image_frames
        for metric in features:
            if metric not in with_features(names):
                raise UserError(
                    f"--features {metric}={features[metric]} has no use: features are taken by the metrics "
                    f"{', '.join(with_features(METRICS))}, and {metric!r} is not among those asked for."
                )
        made: dict[str, Extractor] = {}
        self.extractors: dict[str, Extractor] = {}
        for metric in with_features(names):
            name, kind = features.get(metric, METRICS[metric].features), METRICS[metric].kind
            if name not in made:
                made[name] = load_extractor(name, weights.get(name))
            if made[name].kind != kind:
                raise UserError(
                    f"{METRICS[metric].title} takes features of {kind}s, and {name}'s are of {made[name].kind}s."
                )
            self.extractors[metric] = made[name]
        self.provenance: dict[str, Any] = {
            metric: {"features": extractor.name, "version": extractor.version, "label": extractor.label}
            for metric, extractor in self.extractors.items()
        }
        for metric in ("lpips", "clip_score"):
            need = METRICS[metric].weights
            if metric in names and need not in weights:
                what = (
                    "LPIPS's weights" if need == "lpips" else "the folder of a CLIP in transformers' layout"
                )
                raise UserError(
                    f"{METRICS[metric].title} needs {what}: pass --weights {need}=PATH, or leave it out."
                )
        self._lpips = self._load_lpips(weights["lpips"]) if "lpips" in names else None
        self._text = self._load_text(weights["clip"]) if "clip_score" in names else None
        self._clip = (made.get("clip") or load_extractor("clip", weights["clip"])) if self._text else None
        if self._clip:
            self.provenance["clip_score"] = {"version": self._clip.version, "label": self._clip.label}

    def measure(self, batch: Batch, sets_alone: bool = False) -> list[Row]:
        """A row for each clip; of a reference set's the features alone.

        Raises:
          UserError: the clips are too small or too short for a metric, or a rate is needed and not known.
        """
        # Those of all frames come first, and others are picked from them.
        alike = [] if sets_alone else [name for name in self.names if name.endswith("_consistency")]
        figures: dict[str, Sequence[float]] = {}
        for name in alike:
            rows = batch.features(self.extractors[name])
            figures[name] = [temporal.consistency(each) for each in rows]
        features = {
            name: batch.features(self.extractors[name], self.image_frames) for name in of_sets(self.names)
        }
        if not sets_alone:
            figures |= {
                name: self._figures(name, batch) for name in self.names if name not in (*alike, *features)
            }
        for name, each in figures.items():
            if np.isnan(np.asarray(each, float)).any():
                raise UserError(f"{METRICS[name].title} of a clip is no number: look at its frames.")
        return [
            Row(
                {name: float(figures[name][i]) for name in self.names if name in figures},
                {name: rows[i] for name, rows in features.items()},
            )
            for i in range(len(batch.clips))
        ]

    def _figures(self, name: str, batch: Batch) -> Sequence[float]:
        clips = batch.clips
        if METRICS[name].reference == "pair":
            return self._compared(name, clips, _needed(batch.references))
        if name == "clip_score":
            return self._clip_score(batch)
        if name == "temporal_flicker":
            return [temporal.temporal_flicker(clip) for clip in clips]
        if name == "warping_error":
            flows = batch.flow(1), batch.flow(1, backward=True)
            return [temporal.warping_error(*each) for each in zip(clips, *flows, strict=True)]
        if batch.fps is None:
            raise UserError(
                f"{METRICS[name].title} needs the clips' rate, which arrays don't tell: pass --fps."
            )
        step = temporal.motion_step(batch.fps)
        if clips.shape[1] <= step:
            raise UserError(
                f"{METRICS[name].title} compares frames an eighth of a second apart: at {batch.fps:g} fps clips of "
                f"at least {step + 1} frames are needed, not {clips.shape[1]}; take longer ones (--frames)."
            )
        function = temporal.motion_magnitude if name == "motion_magnitude" else temporal.dynamic_degree
        return [float(function(flow, batch.fps / step)) for flow in batch.flow(step)]

    def _compared(self, name: str, clips: np.ndarray, references: np.ndarray) -> Sequence[float]:
        if name == "psnr":
            return np.asarray(metrics.psnr(clips, references))
        if name == "ssim":
            return np.asarray(metrics.ssim(clips, references))
        if name == "ms_ssim":
            scales = metrics.ms_ssim_scales(clips.shape[2], clips.shape[3])
            return np.asarray(metrics.ms_ssim(clips, references, weights=scales))
        assert self._lpips is not None
        pairs = [each.reshape(-1, *each.shape[2:]) for each in (clips, references)]
        least = lpips.LEAST_SIDE[self._lpips[0]]
        if min(clips.shape[2:4]) < least:
            raise UserError(
                f"LPIPS needs frames of at least {least} x {least} pixels, not {clips.shape[2:4]}."
            )
        rows = [np.asarray(self._lpips[1](*block))[:number] for number, block in frame_blocks(pairs, 1 << 16)]
        return np.concatenate(rows).reshape(len(clips), -1).mean(1, dtype=np.float64)

    def _clip_score(self, batch: Batch) -> Sequence[float]:
        """The mean over frames of 100 times the cosine of picture and caption, not below 0 (Hessel et al. 2021)."""
        assert self._clip is not None and self._text is not None
        pictures = batch.features(self._clip)
        words = [self._text(caption) for caption in batch.captions]
        return [
            float(np.maximum(100 * each @ word, 0).mean()) for each, word in zip(pictures, words, strict=True)
        ]

    def _load_lpips(self, path: str) -> tuple[str, Callable[..., jax.Array]]:
        tensors = lpips.read_lpips(user_path(path))
        trunk, weights = lpips.trunk_of(tensors), loaded(lpips.convert, tensors, "LPIPS", path)
        label = f"{trunk}, weights of {pathlib.Path(path).name}"
        self.provenance["lpips"] = {"version": array_digest(weights.values()), "label": label}

        def distance(frames: jax.Array, references: jax.Array) -> jax.Array:
            frames, references = (each.astype(np.float32) for each in (frames, references))
            return lpips.lpips(weights, frames, references, trunk)

        return trunk, jax.jit(distance)

    def _load_text(self, path: str) -> TextScore:
        folder, _, weights = load_clip(path)
        _, sizes = transformers.clip_towers(folder.settings)
        length = sizes.max_position_embeddings
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder.path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(
                f"{path} has no tokenizer.json that can be read: fetch the model again."
            ) from error
        tokenizer.enable_truncation(length)  # its end token stays
        tokenizer.no_padding()
        run = jax.jit(functools.partial(transformers.clip_text, sizes=sizes))

        @functools.lru_cache(maxsize=4096)
        def embed(caption: str) -> np.ndarray:
            ids = tokenizer.encode(caption).ids
            return np.asarray(run(weights, np.array([ids + [0] * (length - len(ids))])))[0]

        return embed


def _needed(references: np.ndarray | None) -> np.ndarray:
    if references is None:
        raise UserError("Clips are compared one by one with others: name their folder with --reference.")
    return references
