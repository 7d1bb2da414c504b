"""Toyworld as a TensorFlow Datasets builder, written and read without TensorFlow.

Importing this file registers the builder:

    import tensorflow_datasets as tfds
    from sora_jax.data import toyworld_tfds

    records = tfds.data_source("toyworld", split="validation", data_dir="data")
    clip = toyworld_tfds.decode(records[0])

TFDS's own `Video` feature needs TensorFlow, so a clip is stored as the bytes of an mp4 in ArrayRecord, and `decode`
turns a record back into a `Clip`. `TfdsClips` is such a data set as a source for the pipeline.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from sora_jax.media.clip import Clip
from sora_jax.media.video import Video, read_video
from sora_jax.toyworld import render
from sora_jax.toyworld.scene import SPLITS, WorldConfig


@dataclasses.dataclass(kw_only=True, eq=False)
class ToyworldConfig(tfds.core.BuilderConfig):
    """What is rendered into a data set.

    Attributes:
      clips: how many in the training split; each other split has a tenth, at least one.
      shapes: (frames, height, width, fps) options, of which each clip draws one; sides are even.
      world: how often what is drawn.
      seed: another seed, another world of clips.
      crf: x264's constant rate factor; 0 is lossless but for the halved resolution of colour.
    """

    clips: int = 1000
    shapes: tuple[tuple[int, int, int, float], ...] = ((17, 64, 64, 8.0),)
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    seed: int = 0
    crf: int = 10


class Toyworld(tfds.core.GeneratorBasedBuilder):
    """Short captioned clips of simple shapes in motion, whose truth is known."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar = [
        ToyworldConfig(name="clips", description="17 frames of 64x64 at 8 frames a second."),
        ToyworldConfig(
            name="mixed",
            description="Images and clips of several durations and aspect ratios.",
            shapes=(
                (1, 64, 64, 8.0),
                (17, 64, 64, 8.0),
                (33, 64, 64, 8.0),
                (17, 64, 112, 8.0),
                (17, 112, 64, 8.0),
            ),
        ),
    ]

    def __init__(self, *, file_format: Any = None, **kwargs: Any):
        # TFDS's default, TFRecord, needs TensorFlow.
        super().__init__(file_format=file_format or "array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "mp4": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "fps": tfds.features.Scalar(dtype=np.float32),
                    "short": text,
                    "detailed": text,
                    "timed": tfds.features.Sequence({"start": np.float32, "text": text}),
                    "key": text,
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        clips = config.clips if split == "train" else max(1, config.clips // 10)
        source = render.Toyworld(config.world, split, config.seed, clips, config.shapes)
        for index in range(clips):
            clip = source[index]
            yield (
                index,
                {
                    "mp4": encode(clip.video, config.crf),
                    "fps": clip.video.fps,
                    **clip.captions,
                    "timed": [{"start": start, "text": text} for start, text in clip.timed],
                    "key": clip.key,
                },
            )


def encode(video: Video, crf: int = 10) -> bytes:
    """The bytes of the video as an mp4."""
    with tempfile.TemporaryDirectory() as folder:
        return video.save(pathlib.Path(folder) / "clip.mp4", crf=crf).read_bytes()


def decode(record: Mapping[str, Any]) -> Clip:
    """A record of the data source as a clip, decoded by PyAV.

    Raises:
      UserError: the record's bytes are no video.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mp4"
        path.write_bytes(record["mp4"])
        frames = read_video(path).frames
    timed = record["timed"]
    if isinstance(timed, Mapping):  # TFDS hands a sequence of records over as a record of sequences
        timed = [
            {"start": start, "text": text} for start, text in zip(timed["start"], timed["text"], strict=True)
        ]
    return Clip(
        video=Video(frames, float(record["fps"])),
        captions={kind: _text(record[kind]) for kind in ("short", "detailed")},
        timed=tuple((float(shot["start"]), _text(shot["text"])) for shot in timed),
        key=_text(record["key"]),
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class TfdsClips:
    """A split of a built Toyworld as a source of clips (see `clip.ClipSource`); builds it where it is missing.

    Raises:
      UserError: on reading, if a record's bytes are no video.
    """

    def __init__(self, split: str, data_dir: str, config: str | ToyworldConfig = "clips"):
        self.records = tfds.data_source(
            "toyworld", split=split, data_dir=data_dir, builder_kwargs={"config": config}
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Clip:
        return decode(self.records[index])
