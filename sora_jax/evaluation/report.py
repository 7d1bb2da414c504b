"""What a model does, in figures: how well it keeps a video, and how well its clips keep to their prompts.

Each function returns plain values, ready for a JSON file: the figures, the settings that gave them, and what made
them (model, versions, commit).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sora_jax.errors import UserError
from sora_jax.evaluation import metrics
from sora_jax.evaluation.intervals import share_interval
from sora_jax.evaluation.provenance import made_by
from sora_jax.media.video import Report, Video, frame_count, probe, resample, stream_frames
from sora_jax.pipeline.pipeline import Pipeline, Request
from sora_jax.pipeline.settings import MAX_FRAMES
from sora_jax.toyworld import captions, oracle
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, WorldConfig, check_split

Progress = Callable[[int, int], None]  # (done, in all)
Show = Callable[[str, list[Video]], None]  # (label, the clips it speaks of)

ATTRIBUTES = ("colour", "shape", "direction", "size", "count", "inside")
SOURCES = ("generated", "truth", "vae")
# One thing that goes straight, wholly inside the frame, under a camera that stands.
ONE_THING = WorldConfig(
    objects=(1.0, 0.0, 0.0),
    motions=tuple(float(motion == "straight") for motion in world.MOTIONS),
    cameras=(1.0, 0.0, 0.0),
    two_shots=0.0,
    occluder=0.0,
    leave=0.0,
)
_BATCH = 32  # clips a call of the model: their noise and latents are held at once
_PIXELS = 1 << 21  # of a piece of video held at once
_OTHERS = 8  # other prompts that each clip is compared with, for the level of chance


def evaluate_vae(
    pipeline: Pipeline,
    files: Sequence[str | os.PathLike[str]],
    resolution: int = 128,
    seconds: float = 4.0,
    start: float = 0.0,
    progress: Progress | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """PSNR and SSIM of what the autoencoder makes of videos and pictures.

    Each file is scaled so that its short side is `resolution`, cropped to even sides, and taken in pieces of at
    most 49 frames, each encoded and decoded on its own; the figures are of all its frames (see `quality`).

    Args:
      pipeline: the model.
      files: of any kind that `video.read_video` reads.
      resolution: pixels.
      seconds: at most this much of each file; 0 is all of it.
      start: seconds into each file.
      progress: called with (frames done, frames in all, as far as the files' headers tell).
      show: called with each file's name and figures, and its first piece and that piece's reconstruction.

    Returns:
      `files` (a row each: path, frames, size, fps, psnr in decibels or None where nothing was lost, ssim, notes on
      the file such as what of it is damaged), `mean` over the files, `settings`, `model`, `made_by`.

    Raises:
      UserError: there are no files, or one can't be read or ends before `start`.
    """
    if not files:
        raise UserError("There is no file to evaluate: name at least one video or picture.")
    if resolution < 16 or seconds < 0 or start < 0:
        raise UserError("The resolution is at least 16 pixels, and seconds and start are not negative.")
    progress, show = progress or _ignore, show or _ignore
    expected = [_expected_frames(path, seconds, start) for path in files]
    progress(0, sum(expected))
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(files):
        done, error, similarity, source = 0, 0.0, 0.0, (0, 0)
        first: list[Video] = []
        met = Report()
        for piece, source in _pieces(path, resolution, seconds, start, met, pipeline.stride):
            again = pipeline.reconstruct(piece)
            error += len(piece) * 10 ** (-float(metrics.psnr(again.frames, piece.frames)) / 10)
            similarity += len(piece) * float(metrics.ssim(again.frames, piece.frames))
            first = first or [piece, again]
            done += len(piece)
            before = sum(row["frames"] for row in rows)
            progress(before + done, before + max(done, sum(expected[number:])))
        if not done:
            raise UserError(f"{path} has no frame at {start:g} seconds: it ends before; start earlier.")
        row: dict[str, Any] = {
            "file": os.fspath(path),
            "frames": done,
            "fps": first[0].fps,
            "height": first[0].size[0],
            "width": first[0].size[1],
            "source_height": source[0],
            "source_width": source[1],
            "psnr": -10 * math.log10(error / done) if error else None,
            "ssim": similarity / done,
            "notes": [*met.remarks(), *met.damage(start, start + done / first[0].fps)],
        }
        rows.append(row)
        show(f"{pathlib.Path(path).name}: {_decibels(row['psnr'])}, SSIM {row['ssim']:.3f}", first)
    finite = [row["psnr"] for row in rows if row["psnr"] is not None]
    return {
        "evaluation": "vae",
        "model": pipeline.name,
        "settings": {"resolution": resolution, "seconds": seconds, "start": start},
        "mean": {
            "psnr": float(np.mean(finite)) if finite else None,
            "ssim": float(np.mean([row["ssim"] for row in rows])),
        },
        "files": rows,
        "made_by": made_by(),
    }


def evaluate_toyworld(
    pipeline: Pipeline | None,
    split: str = "heldout",
    clips: int = 256,
    durations: Sequence[float] = (2.0,),
    aspects: Sequence[str] = ("1:1",),
    resolution: int = 64,
    fps: float = 8.0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    source: str = "generated",
    expand: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """How often a clip shows what its prompt says, read back by Toyworld's oracle.

    Prompts are of one thing that moves straight, and state its size, colour, shape and direction; in the split
    "heldout" training never showed the colour of that shape, or that direction of that colour. Clips take the
    shapes durations × aspects in turn.

    Args:
      pipeline: the model; None will do where `source` is "truth".
      split: of `scene.SPLITS`; "paraphrase" has words that training never had.
      clips: how many prompts; clip i has the seed `seed` + i.
      durations, aspects, resolution, fps, steps, guidance, solver: as in `pipeline.Request`; None: the model's own.
      source: "generated", "truth" (true clips: how much the oracle itself gets wrong), or "vae" (true clips
        through the autoencoder: how much is lost there).
      expand: whether the model gets each prompt with details added (`captions.expanded_prompt`). The oracle reads the
        same attributes as without.
      progress: called with (clips done, clips in all).
      settings: further ones of `settings.Settings`.
      show: called with each clip's prompt, followed by what was read wrong, and the clip.

    Returns:
      `accuracy` (see `_accuracy`; "all" is colour, shape and direction at once), `shapes` (the same for each
      shape), `clips` (each one's prompt, truth, reading and verdicts), `settings`, `model`, `made_by`.

    Raises:
      UserError: no such split or source, no clips, or the model can't make such a clip.
    """
    if source not in SOURCES:
        raise UserError(f"Clips can't come from {source!r}: choose one of {', '.join(SOURCES)}.")
    if clips < 1 or not durations or not aspects:
        raise UserError("At least one clip, one duration and one aspect ratio are needed.")
    progress, show = progress or _ignore, show or _ignore
    given = {"steps": steps, "guidance": guidance, "solver": solver}
    asked = {name: value for name, value in given.items() if value is not None}
    sampler: dict[str, Any] = (pipeline.defaults if pipeline else {}) | asked | settings
    requests = [
        Request("?", duration, resolution, aspect, fps, **sampler)
        for duration, aspect in itertools.product(durations, aspects)
    ]
    examples = list(itertools.islice(_examples(split, requests, seed, expand), clips))
    if source == "generated":
        for _, request in examples:
            _needed(pipeline).check(request)
    rows: list[dict[str, Any]] = []
    progress(0, clips)
    for first in range(0, clips, _BATCH):
        part = examples[first : first + _BATCH]

        def partly(done: int, in_all: int, first: int = first, size: int = len(part)) -> None:
            progress(first + size * done // max(in_all, 1), clips)

        for (scene, request), video in zip(part, _videos(pipeline, part, source, partly), strict=True):
            rows.append(_verdict(scene, request, video))
            wrong = [name for name, right in rows[-1]["right"].items() if not right and name != "all"]
            show(f"{request.prompt}: {'wrong ' + ', '.join(wrong) if wrong else 'all right'}", [video])
    progress(clips, clips)
    chance = _chance(examples)
    per_shape = [rows[i :: len(requests)] for i in range(min(len(requests), clips))]
    return {
        "evaluation": "toyworld",
        "model": None if pipeline is None else pipeline.name,
        "settings": {
            "split": split,
            "clips": clips,
            "durations": list(durations),
            "aspects": list(aspects),
            "resolution": resolution,
            "fps": fps,
            "seed": seed,
            "source": source,
            "expand": expand,
        }
        | (
            {name: getattr(requests[0], name) for name in ("steps", "guidance")} | sampler
            if source == "generated"
            else {}
        ),
        "accuracy": _accuracy(rows, chance),
        "shapes": [
            {key: some[0][key] for key in ("frames", "height", "width")}
            | {"accuracy": _accuracy(some, chance)}
            for some in per_shape
        ],
        "clips": rows,
        "made_by": made_by(),
    }


def _ignore(*_: Any) -> None:
    """What `progress` and `show` are where they aren't asked for."""


def _expected_frames(path: str | os.PathLike[str], seconds: float, start: float) -> int:
    known = probe(path)
    left = math.inf if math.isnan(known.seconds) else max(known.seconds - start, 0.0)
    wanted = min(left, seconds or math.inf)
    return frame_count(wanted, known.fps) if math.isfinite(wanted) else 0


def _pieces(
    path: str | os.PathLike[str], resolution: int, seconds: float, start: float, met: Report, stride: int
) -> Iterator[tuple[Video, tuple[int, int]]]:
    """(a piece of the scaled video, (height, width) in the file), one after another.

    But for the last they fill latent frames of `stride` video frames.
    """
    fps = probe(path).fps
    limit = frame_count(seconds, fps) if seconds else None
    frames = itertools.islice((frame for _, frame in stream_frames(path, start, fps, met)), limit)
    piece: list[np.ndarray] = []
    for frame in frames:
        size = frame.shape[:2]
        height, width = (round(side * resolution / min(size)) for side in size)
        piece.append(resample(frame, height, width)[: height - height % 2, : width - width % 2])
        if len(piece) == 1 + stride * min(max(_PIXELS // (stride * height * width), 1), 48 // stride):
            yield Video(np.stack(piece), fps), size
            piece = []
    if piece:
        yield Video(np.stack(piece), fps), size


def _decibels(psnr: float | None) -> str:
    return "lossless" if psnr is None else f"{psnr:.2f} dB"


EvalExample = tuple[Scene, Request]


def _examples(
    split: str, requests: Sequence[Request], seed: int, expand: bool = False
) -> Iterator[EvalExample]:
    """Scenes of one thing, each with the request that asks for it."""
    number = 0
    for index in itertools.count():
        request = requests[number % len(requests)]
        frames, height, width = request.shape()
        scene = sample_scene(seed, index, split, (frames - 1) / request.fps, width / height, ONE_THING)
        if len(scene.shots[0].things) > 1:  # held-out scenes have two now and then
            continue
        thing = scene.shots[0].things[0]
        words = np.random.default_rng((seed, check_split(split), index, 3))
        prompt = captions.single_object_prompt(
            thing.shape, thing.colour, thing.size, thing.direction, words, split == "paraphrase"
        )
        if expand:
            prompt = captions.expanded_prompt(prompt, bool(thing.direction), words, split == "paraphrase")
        yield scene, dataclasses.replace(request, prompt=prompt, seed=seed + number)
        number += 1


def _needed(pipeline: Pipeline | None) -> Pipeline:
    if pipeline is None:
        raise UserError(
            "Only true clips can be read without a model: name one, or choose the source 'truth'."
        )
    return pipeline


def _videos(
    pipeline: Pipeline | None, examples: Sequence[EvalExample], source: str, progress: Progress
) -> Iterator[Video]:
    if source == "generated":
        # Each was checked by itself; that so many are made together is the evaluation's choice, not the user's.
        requests = [dataclasses.replace(request, max_frames=MAX_FRAMES) for _, request in examples]
        yield from _needed(pipeline).generate_batch(requests, progress)
        return
    for done, (scene, request) in enumerate(examples):
        progress(done, len(examples))
        video = Video(render(scene, *request.shape(), request.fps), request.fps)
        yield video if source == "truth" else _needed(pipeline).reconstruct(video)


def _verdict(scene: Scene, request: Request, video: Video) -> dict[str, Any]:
    reading, thing = oracle.read(video), scene.shots[0].things[0]
    names = ("shape", "colour", "size", "direction")
    frames, height, width = request.shape()
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "frames": frames,
        "height": height,
        "width": width,
        "truth": {name: getattr(thing, name) for name in names},
        "read": [{name: getattr(seen, name) for name in (*names, "inside")} for seen in reading.things],
        "right": oracle.score(reading, scene, _asked(scene)),
    }


def _asked(scene: Scene) -> tuple[str, ...]:
    """The attributes that the prompt states: a picture's has no direction."""
    return tuple(name for name in ATTRIBUTES if name != "direction" or scene.shots[0].things[0].direction)


def _chance(examples: Sequence[EvalExample]) -> dict[str, float | None]:
    """How often a perfect clip of another of the prompts is right; None where every prompt asks the same."""
    earned: dict[str, list[bool]] = {}
    for i, (scene, request) in enumerate(examples):
        for k in range(1, min(_OTHERS + 1, len(examples))):
            reading = _perfect_reading(examples[(i + k) % len(examples)][0], request)
            for name, right in oracle.score(reading, scene, _asked(scene)).items():
                earned.setdefault(name, []).append(right)
    levels = {name: float(np.mean(right)) for name, right in earned.items()}
    return {name: level if level < 1 else None for name, level in levels.items()}


def _perfect_reading(scene: Scene, request: Request) -> oracle.Reading:
    thing = scene.shots[0].things[0]
    frames, *size = request.shape()
    seen = oracle.ReadThing(
        thing.shape, thing.colour, thing.size, thing.direction, thing.motion, inside=True, reappears=False
    )
    times = tuple(t / request.fps for t in range(frames))
    return oracle.Reading((seen,), 0, ((0.0, frames / request.fps),), times, (size[0], size[1]))


def _accuracy(rows: Sequence[dict[str, Any]], chance: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """For each attribute: `right` of `of` clips, their `share`, its 95% interval `low` to `high`, and `chance`.

    Chance is how often a perfect clip of another of the prompts would be right; None where all prompts ask the
    same (one thing, inside the frame): there the figure speaks of the drawing, not of obedience.
    """
    out = {}
    for name in (*ATTRIBUTES, "all"):
        verdicts = [row["right"][name] for row in rows if name in row["right"]]
        if not verdicts:
            continue
        low, high = share_interval(sum(verdicts), len(verdicts))
        out[name] = {
            "right": int(sum(verdicts)),
            "of": len(verdicts),
            "share": sum(verdicts) / len(verdicts),
            "low": low,
            "high": high,
            "chance": chance.get(name),
        }
    return out
