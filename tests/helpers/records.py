"""Clips that hold their own number, and their records as a latent cache has them."""

import numpy as np

from sora_jax.media.clip import Clip
from sora_jax.media.video import Video

SHAPES = ((1, 16, 16), (5, 16, 32), (5, 32, 16), (9, 16, 16))


class Numbers:
    """A data set whose clip i is filled with the number i."""

    def __init__(self, count: int, broken: int = -1):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        if index == self.broken:
            raise KeyboardInterrupt
        frames = np.full((*SHAPES[index % len(SHAPES)], 3), index, np.uint8)
        return Clip(Video(frames, 8.0), {"short": f"number {index}"}, (), f"clip-{index}")


class Encoder:
    """Stands for the VAE and the text encoder; remembers the shapes it was given."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, clips: list[Clip]) -> list[dict]:
        self.shapes.append((len(clips), *clips[0].video.frames.shape))
        return [self.record(clip) for clip in clips]

    @staticmethod
    def record(clip: Clip) -> dict:
        frames = clip.video.frames[::4, ::8, ::8]
        latent = np.concatenate([frames, -2.0 * frames[..., :1]], axis=-1).astype(np.float16)
        words = int(frames.max()) % 5
        captions = {
            kind: {
                "text": np.full((words + extra, 6), extra, np.float16),
                "time": np.zeros(words + extra, np.float16),
            }
            for extra, kind in ((1, "short"), (3, "detailed"))
        }
        one_stream = {
            "ends": 4 * np.arange(len(latent), dtype=np.int32),
            "first": np.arange(len(latent)) == 0,
            "given": np.zeros(len(latent), bool),
        }
        return {"latent": latent, "fps": clip.video.fps, "key": clip.key, "captions": captions} | one_stream


def records(count: int) -> list[dict]:
    return Encoder()([Numbers(count)[i] for i in range(count)])
