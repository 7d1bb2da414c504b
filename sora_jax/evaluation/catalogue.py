"""The metrics of `sora-jax evaluate videos`, in one table: what each is, and what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from sora_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of videos.

    Attributes:
      title: its name for people.
      better: which way is better, where one is.
      unit: of its figure; "" of a number without one.
      reference: "set" compares the folder with another as a whole, "pair" each clip with the one of its name, ""
        needs none.
      frames: of a clip, at least.
      kind, features: of which kind its features are, and which it takes by default; "" where it has none.
      weights: what local weights it needs, for `--weights`; "" none.
      usual: how many clips, or pictures, published figures take.
      digits: after the point, in tables; distances of sets get four in all.
    """

    title: str
    better: Literal["higher", "lower", "neither"]
    unit: str = ""
    reference: Literal["", "set", "pair"] = ""
    frames: int = 1
    kind: Literal["", "video", "image"] = ""
    features: str = ""
    weights: str = ""
    usual: int = 0
    digits: int = 4


METRICS = {
    "fvd": Metric("Fréchet video distance", "lower", "", "set", kind="video", features="i3d", usual=2048),
    "fid": Metric(
        "Fréchet image distance",
        "lower",
        "",
        "set",
        kind="image",
        features="efficientnet",
        usual=50_000,
        digits=2,
    ),
    "psnr": Metric("PSNR", "higher", "dB", "pair", digits=2),
    "ssim": Metric("SSIM", "higher", "", "pair"),
    "ms_ssim": Metric("MS-SSIM", "higher", "", "pair"),
    "lpips": Metric("LPIPS", "lower", "", "pair", weights="lpips"),
    "clip_score": Metric("CLIP score", "higher", weights="clip", digits=2),
    "temporal_flicker": Metric("temporal flicker", "higher", frames=2),
    "warping_error": Metric("error of warping", "lower", frames=2, digits=5),
    "motion_magnitude": Metric("motion magnitude", "neither", "short sides/s", frames=2),
    "dynamic_degree": Metric("dynamic degree", "neither", "share", frames=2),
    "subject_consistency": Metric(
        "subject consistency", "higher", frames=2, kind="image", features="efficientnet"
    ),
    "background_consistency": Metric(
        "background consistency", "higher", frames=2, kind="image", features="efficientnet"
    ),
}
# Metrics that need neither a reference nor weights.
DEFAULTS = ("temporal_flicker", "warping_error", "motion_magnitude", "dynamic_degree")


def choose(names: Sequence[str], with_reference: bool) -> tuple[str, ...]:
    """The metrics asked for, each once; where none is, `DEFAULTS`, and FVD where there is a reference.

    Raises:
      UserError: there is no such metric.
    """
    if not names:
        return (*(("fvd",) if with_reference else ()), *DEFAULTS)
    for name in names:
        if name not in METRICS:
            hint = nearest(name, METRICS)
            meant = f"did you mean {hint}?" if hint else f"choose from {', '.join(METRICS)}."
            raise UserError(f"There is no metric called {name!r}: {meant}")
    return tuple(dict.fromkeys(names))


def with_features(names: Iterable[str]) -> list[str]:
    """Those of them that are made of features."""
    return [name for name in names if METRICS[name].kind]


def of_sets(names: Iterable[str]) -> list[str]:
    """Those of them that compare sets."""
    return [name for name in names if METRICS[name].reference == "set"]


def of_pairs(names: Iterable[str]) -> list[str]:
    """Those of them that compare clip with clip."""
    return [name for name in names if METRICS[name].reference == "pair"]
