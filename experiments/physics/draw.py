"""Draws the clips that run.py measures, and keeps them, so that a measure may change without drawing again."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from scenes import FPS, FRAMES, GIVEN, LAWS, SIZE, scenes, true_clip

from sora_jax.errors import atomic_path
from sora_jax.media.video import Video
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.pipeline import Pipeline, Request, text_to_video
from sora_jax.toyworld.scene import Scene

sys.path.append(str(pathlib.Path(__file__).parents[1] / "compute"))
from history import MODELS, Trained, restore

WAYS = ("continued", "told")  # from the first frames and the caption, or from the caption alone
ASKED = {"permanence": "continued", "straight": "told"}  # laws that are asked for in one way alone
STEPS = (12, 4, 2)
PART = 16  # clips at once


@dataclasses.dataclass(frozen=True)
class Row:
    """What is drawn: one law by one model in one way."""

    model: Trained
    law: str
    way: str = "continued"
    steps: int = STEPS[0]

    @property
    def name(self) -> str:
        """For a file's name, and a key of the results."""
        return f"{self.model.name} {self.law} {self.way} {self.steps}"


def rows(models: Sequence[Trained] = MODELS) -> list[Row]:
    """All that is asked for, model by model. Where a pillar stands no caption tells."""
    kinds = [(law, way) for way in WAYS for law in LAWS if way == ASKED.get(law, way)]
    return [Row(model, law, way) for model in models for law, way in kinds]


def other_steps(model: Trained = MODELS[-1]) -> list[Row]:
    """The same of one model, with less of the sampler's compute."""
    return [Row(model, row.law, steps=steps) for steps in STEPS[1:] for row in rows([model])[: len(LAWS) - 1]]


def draw(row: Row, clips: int, folder: pathlib.Path) -> np.ndarray:
    """uint8[clips,T,Y,X,3], of which those that `folder` has are not drawn again."""
    path, have = folder / f"{row.name}.npz", _there(row, folder)
    while len(have) < clips:
        pipeline, until = model_of(row.model), min(len(have) + PART, clips)
        wanted = list(enumerate(scenes_of(row.law, clips)))[len(have) : until]
        jobs = [_job(pipeline, row, number, *each) for number, each in wanted]
        have = np.concatenate([have, np.stack([video.frames for video in pipeline.make(jobs)])])
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, clips=have)
    return have[:clips]


def count(row: Row, folder: pathlib.Path) -> int:
    """How many clips of it `folder` has."""
    return len(_there(row, folder))


def _there(row: Row, folder: pathlib.Path) -> np.ndarray:
    path = folder / f"{row.name}.npz"
    return np.load(path)["clips"] if path.is_file() else np.empty((0, FRAMES, SIZE, SIZE, 3), np.uint8)


def _job(pipeline: Pipeline, row: Row, seed: int, scene: Scene, caption: str) -> Job:
    settings = {"seed": seed, "steps": row.steps}
    if row.way == "told":
        return text_to_video(pipeline, Request(caption, duration=FRAMES / FPS, fps=FPS, **settings))
    known = Video(true_clip(scene).frames[:GIVEN], FPS)
    return pipeline.job("extend", known, (FRAMES - GIVEN) / FPS, caption, **settings)


model_of = functools.cache(restore)
scenes_of = functools.cache(scenes)


if __name__ == "__main__":  # FOLDER CLIPS: all of it, a few clips of each row at a time
    where, most = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    for so_far in [*range(PART, most, PART), most]:
        for each in [*rows([MODELS[i] for i in (4, 2, 0, 3, 1)]), *other_steps()]:
            draw(each, so_far, where)
            print(each.name, so_far, round(time.process_time()), "s", flush=True)
