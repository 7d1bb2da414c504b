"""Whether each ability does what it is for, on toyworld's clips, whose truth is known.

Every function of `TRIALS` takes a pipeline, a number of clips and a seed, and yields clips to make, each with how it is
judged: by the oracle, or in decibels; no network judges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.errors import UserError, nearest
from sora_jax.evaluation import metrics
from sora_jax.evaluation.provenance import made_by
from sora_jax.evaluation.report import ONE_THING, interval
from sora_jax.media.video import Video, resize
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.storyboard import Card, Storyboard
from sora_jax.toyworld import captions, oracle
from sora_jax.toyworld import scene as world
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, WorldConfig

FPS, SIZE, BATCH = 8.0, (64, 64), 16
BOUNCES = dataclasses.replace(ONE_THING, motions=tuple(float(m == "bounce") for m in world.MOTIONS))

Row = dict[str, Any]
Shown = tuple[str, Video]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One clip of one ability: how it is made, and how it is judged."""

    label: str
    job: Job
    judge: Callable[[Video], Row]
    reference: Video | None = None  # the input, or the truth, to compare


def evaluate_abilities(
    pipeline: Pipeline,
    names: Sequence[str] = (),
    clips: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    show: Callable[[str, Sequence[Video]], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Figures of some abilities, or of all: {"abilities": {name: {criterion: figure}}, …}.

    A criterion that is true or false gives `share`, its 95% interval `low` to `high`, and `of`; a number gives its
    `mean`, `median`, `least` and `most`.

    Args:
      names: keys of `TRIALS`; empty: all.
      clips: of each ability.
      seed: of the scenes and the sampler.
      progress: called with (clips done, clips in all).
      show: called with a label and input and result of each clip.
      settings: of `settings.Settings`.

    Raises:
      UserError: there is no such ability.
    """
    names = tuple(names) or tuple(TRIALS)
    if unknown := set(names) - set(TRIALS):
        near = nearest(min(unknown), TRIALS)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(TRIALS)}."
        raise UserError(f"There is no figure for {min(unknown)!r}: {hint}")
    out: dict[str, Any] = {}
    for number, name in enumerate(names):
        rows: list[Row] = []
        trials = TRIALS[name](pipeline, clips, seed, settings)
        while part := [trial for _, trial in zip(range(BATCH), trials)]:
            for trial, video in zip(part, pipeline.make([trial.job for trial in part]), strict=True):
                row = trial.judge(video)
                rows.append(row)
                if show is not None:
                    wrong = [key for key, value in row.items() if value is False]
                    text = f"{name}: {trial.label}" + (f" (not {', '.join(wrong)})" if wrong else "")
                    show(text, [video] if trial.reference is None else [trial.reference, video])
            if progress is not None:
                progress(number * clips + len(rows), len(names) * clips)
        out[name] = {key: _figure([row[key] for row in rows]) for key in rows[0]}
    return {
        "evaluation": "abilities",
        "model": pipeline.name,
        "settings": {"clips": clips, "seed": seed} | settings,
        "abilities": out,
        "made_by": made_by(),
    }


def steps_between(frames: np.ndarray, around: bool = False) -> np.ndarray:
    """Mean absolute difference of each frame to the next, float[T−1]; with `around`, of the last to the first too."""
    after = np.roll(frames, -1, axis=0) if around else frames[1:]
    before = frames if around else frames[:-1]
    return np.abs(after.astype(float) - before.astype(float)).mean((1, 2, 3))


def _figure(values: Sequence[Any]) -> dict[str, Any]:
    if isinstance(values[0], (bool, np.bool_)):
        low, high = interval(int(sum(values)), len(values))
        return {"share": float(np.mean(values)), "low": low, "high": high, "of": len(values)}
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "least": float(np.min(values)),
        "most": float(np.max(values)),
    }


def _scenes(
    clips: int, seed: int, duration: float, config: WorldConfig = ONE_THING, offset: int = 0
) -> Iterator[tuple[int, Scene]]:
    for number in range(clips):
        yield number, sample_scene(seed, offset + number, "validation", duration, 1.0, config)


def _video(scene: Scene, frames: int, size: tuple[int, int] = SIZE, fps: float = FPS) -> Video:
    return Video(render(scene, frames, *size, fps), fps)


def _prompt(scene: Scene, seed: int, colour: str | None = None) -> str:
    """The scene's words in training's vocabulary, the plain word for a colour where one is named."""
    thing, rng = scene.shots[0].things[0], np.random.default_rng((seed, 11))
    if thing.motion != "straight":
        return captions.short_caption(scene, rng)
    if colour is None:
        return captions.single_object_prompt(thing.shape, thing.colour, None, thing.direction, rng)
    return f"a {colour} {thing.shape} moves {captions.plain_direction(thing.direction or 'right')}"


def _read(video: Video, scene: Scene, names: Sequence[str]) -> Row:
    right = oracle.score(oracle.read(video), scene, names)
    return {name: right[name] for name in names}


def _animate(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    for i, scene in _scenes(clips, seed, 2.0):
        truth, prompt = _video(scene, 17), _prompt(scene, i)
        job = pipeline.job("animate", truth.frames[0], prompt, duration=17 / FPS, seed=seed + i, **settings)

        def judge(video: Video, scene: Scene = scene, truth: Video = truth) -> Row:
            row = _read(video, scene, ("shape", "colour", "direction"))
            return {"kept": row["shape"] and row["colour"]} | row | _given(pipeline, video, truth, [0])

        yield Trial(prompt, job, judge, truth)


def _extend(backward: bool) -> Callable[..., Iterator[Trial]]:
    def trials(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
        given, total = 9, 36
        for i, scene in _scenes(clips, seed, (total - 1) / FPS, BOUNCES):
            truth, prompt = _video(scene, total), _prompt(scene, i)
            known = Video(truth.frames[-given:] if backward else truth.frames[:given], FPS)
            seconds = (total - given) / FPS
            job = pipeline.job("extend", known, seconds, prompt, backward=backward, seed=seed + i, **settings)

            def judge(video: Video, scene: Scene = scene, known: Video = known) -> Row:
                # Far from the input: the last (or first) quarter of the result.
                far = Video(video.frames[:given] if backward else video.frames[-given:], FPS)
                row = _read(far, scene, ("shape", "colour", "count"))
                places = range(total - given, total) if backward else range(given)
                return (
                    {"identity": row["shape"] and row["colour"]}
                    | row
                    | _given(pipeline, video, known, places)
                )

            yield Trial(prompt, job, judge, truth)

    return trials


def _loop(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    for i, scene in _scenes(clips, seed, 1.0):
        truth, prompt = _video(scene, 9), _prompt(scene, i)
        job = pipeline.job("loop", truth, prompt, 1.5, seed=seed + i, **settings)

        def judge(video: Video, truth: Video = truth) -> Row:
            steps = steps_between(video.frames, around=True)
            return {
                "closes": bool(steps[-1] <= np.median(steps[:-1])),
                "closing step over median": float(steps[-1] / np.median(steps[:-1])),
                "largest over median": float(steps.max() / np.median(steps)),
            } | _given(pipeline, video, truth, range(9))

        yield Trial(prompt, job, judge, truth)


def _connect(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    pairs = zip(_scenes(clips, seed, 1.0), _scenes(clips, seed, 1.0, offset=10_000))
    for (i, one), (_, other) in pairs:
        a, b = _video(one, 9), _video(other, 9)
        job = pipeline.job("connect", a, b, seed=seed + i, **settings)

        def judge(video: Video, a: Video = a, b: Video = b) -> Row:
            T, steps = len(video), steps_between(video.frames)
            largest = float(steps.max() / np.median(steps))
            first = _given(pipeline, video, a, range(9))
            last = _given(pipeline, video, b, range(T - 9, T))
            return {
                "smooth": bool(largest <= 3),
                "largest step": largest,
                "ends": min(first["given"], last["given"]),
            }

        yield Trial(f"{_prompt(one, i)} / {_prompt(other, i)}", job, judge)


def _edit(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    for i, scene in _scenes(clips, seed, 2.0):
        thing, truth = scene.shots[0].things[0], _video(scene, 17)
        others = [
            name
            for name in world.COLOURS
            if name != thing.colour and not world.is_heldout(dataclasses.replace(thing, colour=name))
        ]
        colour = others[i % len(others)]
        prompt = _prompt(scene, i, colour)
        job = pipeline.job("edit", truth, prompt, 0.7, seed=seed + i, **settings)
        shot = dataclasses.replace(scene.shots[0], things=(dataclasses.replace(thing, colour=colour),))
        wanted = dataclasses.replace(scene, shots=(shot,))

        def judge(video: Video, wanted: Scene = wanted) -> Row:
            return _read(video, wanted, ("colour", "direction", "shape"))

        yield Trial(f"{thing.colour} to {prompt}", job, judge, truth)


def _storyboard(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    cut, total = 12, 25
    pairs = zip(_scenes(clips, seed, 1.5), _scenes(clips, seed, 1.5, offset=10_000))
    for (i, one), (_, other) in pairs:
        prompts = (_prompt(one, i), _prompt(other, i))
        cards = (Card(0.0, prompts[0]), Card(cut / FPS, prompts[1]))
        job = pipeline.job("storyboard", Storyboard(cards, total / FPS, FPS), seed=seed + i, **settings)

        def judge(video: Video, scenes: tuple[Scene, Scene] = (one, other)) -> Row:
            parts = (video.frames[: cut - 2], video.frames[cut + 2 :])
            rows = [
                _read(Video(part, FPS), scene, ("colour", "direction", "shape"))
                for part, scene in zip(parts, scenes, strict=True)
            ]
            both = {key: rows[0][key] and rows[1][key] for key in rows[0]}
            return {
                "colour and direction": both["colour"] and both["direction"],
                "all": all(both.values()),
            } | both

        yield Trial(" / ".join(prompts), job, judge)


def _inpaint(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    box = (16, 16, 32, 32)
    for i, scene in _scenes(clips, seed, 2.0):
        truth, prompt = _video(scene, 17), _prompt(scene, i)
        job = pipeline.job("inpaint", truth, prompt, box=box, seed=seed + i, **settings)

        def judge(video: Video, truth: Video = truth) -> Row:
            inside = np.zeros(SIZE, bool)
            inside[16:48, 16:48] = True
            same = (video.frames[:, ~inside] == truth.frames[:, ~inside]).all()
            return {
                "outside unchanged": bool(same),
                "PSNR inside": float(
                    metrics.psnr(video.frames[:, 16:48, 16:48], truth.frames[:, 16:48, 16:48])
                ),
            }

        yield Trial(prompt, job, judge, truth)


def _smooth(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    factor, total = 3, 25
    for i, scene in _scenes(clips, seed, 1.0):
        truth = _video(scene, total, fps=FPS * factor)
        known = Video(truth.frames[::factor], FPS)
        job = pipeline.job("smooth", known, FPS * factor, _prompt(scene, i), seed=seed + i, **settings)

        def judge(video: Video, truth: Video = truth, known: Video = known) -> Row:
            between = np.arange(total) % factor > 0
            place = np.arange(total) / factor
            low, high = np.floor(place).astype(int), np.ceil(place).astype(int)
            part = (place - low)[:, None, None, None]
            others = {
                "repetition": known.frames[low],
                "linear blending": (1 - part) * known.frames[low] + part * known.frames[high],
            }
            score = lambda frames: float(metrics.psnr(frames[between], truth.frames[between]))
            row = {"PSNR": score(video.frames)} | {name: score(frames) for name, frames in others.items()}
            return {"better than both": row["PSNR"] > max(row["repetition"], row["linear blending"])} | row

        yield Trial(_prompt(scene, i), job, judge, truth)


def _upscale(pipeline: Pipeline, clips: int, seed: int, settings: dict[str, Any]) -> Iterator[Trial]:
    for i, scene in _scenes(clips, seed, 1.0):
        truth = _video(scene, 9, (128, 128))
        small = resize(truth, 64, 64)
        job = pipeline.job("upscale", small, 128, _prompt(scene, i), seed=seed + i, **settings)

        def judge(video: Video, truth: Video = truth, small: Video = small) -> Row:
            ours = float(metrics.psnr(video.frames, truth.frames))
            bicubic = float(metrics.psnr(_bicubic(small, 128, 128), truth.frames))
            return {"better than bicubic": ours > bicubic, "PSNR": ours, "bicubic": bicubic}

        yield Trial(_prompt(scene, i), job, judge, truth)


def _bicubic(video: Video, height: int, width: int) -> np.ndarray:
    size, filter_ = (width, height), PIL.Image.Resampling.BICUBIC
    return np.stack([np.asarray(PIL.Image.fromarray(frame).resize(size, filter_)) for frame in video.frames])


def _given(pipeline: Pipeline, video: Video, given: Video, places: Sequence[int]) -> Row:
    """How near given frames are to the autoencoder's own reconstruction of them, in decibels (at most 99)."""
    own = pipeline.reconstruct(Video(given.frames[: len(list(places))], given.fps))
    return {"given": min(float(metrics.psnr(video.frames[list(places)], own.frames)), 99.0)}


TRIALS: dict[str, Callable[..., Iterator[Trial]]] = {
    "animate": _animate,
    "extend": _extend(backward=False),
    "extend backward": _extend(backward=True),
    "loop": _loop,
    "connect": _connect,
    "edit": _edit,
    "storyboard": _storyboard,
    "inpaint": _inpaint,
    "smooth": _smooth,
    "upscale": _upscale,
}
