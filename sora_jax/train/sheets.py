"""Sheets of samples of a transformer in training: videos from the captions of clips, next to the clips."""

from __future__ import annotations

import functools
import sys
from typing import Any

import PIL.Image
from tqdm import tqdm

from sora_jax.data.sources import make_sheet_sources
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.pipeline.pipeline import Pipeline, Request
from sora_jax.train.dit import DiTObjective

CLIPS = 6


class ClipSheets:
    """Draws the sheets of a run: `generate` with the run's own autoencoder, text encoder and limits."""

    def __init__(self, objective: DiTObjective) -> None:
        self.objective = objective

    def check(self) -> None:
        """Reads the clips; raises UserError where there are none."""
        _ = self.clips

    @functools.cached_property
    def clips(self) -> list[tuple[Clip, Request, str]]:
        """Clips that sheets show, what is asked of the model for each, and their labels.

        They are held out of training, or not where a data set has too little for that. What is longer than a packed
        sequence is asked for at the lowest resolution of training.
        """
        data = self.objective.data_config
        sources = make_sheet_sources(data, CLIPS)
        pipeline = self._pipeline(self.objective.template)
        shown: list[tuple[Clip, Request, str]] = []
        for number in range(CLIPS):
            source, held_out = sources[number % len(sources)]
            clip = source[number // len(sources)]
            prompt = self._prompt(clip.captions["short"])
            label = prompt + ("" if held_out else " (a training clip)")
            for resolution in (min(clip.video.size), min(data.resolutions)):
                size = tuple(round(side * resolution / min(clip.video.size)) for side in clip.video.size)
                shape = {"frames": len(clip.video), "size": size, "fps": clip.video.fps}
                request = Request(prompt, **pipeline.request_defaults(shape | {"steps": 20}))
                try:
                    pipeline.check(request)
                except UserError as error:
                    reason = error
                else:
                    shown.append((clip, request, label))
                    break
            else:
                tqdm.write(f"note: sheets of samples leave {clip.key} out: {reason}", file=sys.stderr)
        return shown

    def draw(self, model: Any, step: int) -> PIL.Image.Image | None:
        """What the model makes of the captions, next to the clips that they describe."""
        if not self.clips:
            return None
        clips, requests, prompts = zip(*self.clips, strict=True)
        made = self._pipeline(model).generate_batch(requests)
        videos = [video for clip, own in zip(clips, made, strict=True) for video in (clip.video, own)]
        labels = [label for prompt in prompts for label in (prompt, f"step {step}")]
        return contact_sheet(videos, labels, columns=2)

    def _pipeline(self, model: Any) -> Pipeline:
        run = self.objective
        return Pipeline(run.bundle("run", run.vae, model), run.text_encoder)

    def _prompt(self, caption: str) -> str:
        """The caption, or as many of its words as the model reads."""
        words, most = caption.split(), self.objective.limits.text
        while (count := self.objective.text_encoder.count_tokens(" ".join(words))) > most:
            words = words[: min(len(words) - 1, len(words) * most // count)]
        return " ".join(words) or "a video"
