"""A model for tests of the command line, without a network."""

from __future__ import annotations

import pathlib

import numpy as np

from sora_jax.errors import UserError
from sora_jax.media.video import Video, VideoStream


class FakePipeline:
    """Answers as `pipeline.Pipeline` does, without a network; `before` is called when the sampling begins."""

    name, defaults, stride = "fake", {}, 4

    def __init__(self):
        self.requests, self.before = [], lambda: None

    def request_defaults(self, fields):
        return dict(fields)

    def check(self, request):
        if len(request.prompt.split()) > 64:
            raise UserError("The prompt has too many tokens.")
        if request.shape()[0] > 100:
            raise UserError("That is too long for this model.")

    def generate_batch(self, requests, progress=None):
        return [stream.whole() for stream in self.stream_batch(requests, progress)]

    def stream_batch(self, requests, progress=None):
        self.requests = list(requests)
        steps = self.steps(progress)
        return [VideoStream(self.frames(r, steps), r.shape()[0], r.shape()[1:], r.fps) for r in requests]

    def steps(self, progress):
        self.before()
        for step in range(1, 5):
            progress(step, 4)
            yield

    def frames(self, request, steps):
        count, *size = request.shape()
        for _ in range(count):
            next(steps, None)
            yield np.full((*size, 3), request.seed, np.uint8)

    def reconstruct(self, video):
        return Video(video.frames // 2 * 2, video.fps)


def written_files() -> list[str]:
    """Paths of all files below the current folder."""
    return sorted(str(path) for path in pathlib.Path().rglob("*") if path.is_file())
