"""Spans: the parts of a clip that the causal autoencoder codes each as one sequence.

It codes the first frame of a clip alone and later ones in groups, its stride, each depending on those before. So a
conditioning clip in the middle or at the end is coded as a span of its own: `split_into_spans` cuts a clip such that
conditioning frames decode to the autoencoder's own reconstruction of them, independent of what is generated around
them. A group that overlaps the span after it shows a few frames twice; the later span's are kept. Models of
LTXConditionPipeline were trained on clips of one span, with such frames beside it: `split_beside`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# Video frames of a latent frame, but for a span's first, where an autoencoder doesn't say otherwise: its stride.
FRAMES_PER_LATENT = 4
PREFIX = 2  # latent frames of a clip that stand beside another's, see `canvas.put_beside`


@dataclasses.dataclass(frozen=True)
class CausalSpan:
    """Video frames begin … begin + frames − 1, coded as one sequence by the causal autoencoder.

    They are 1 + k strides, of so many video frames each.
    """

    begin: int
    frames: int
    stride: int = FRAMES_PER_LATENT

    @property
    def ends(self) -> np.ndarray:
        """The last video frame of each latent frame."""
        return self.begin + np.arange(0, self.frames, self.stride)


def split_into_spans(
    conditioning: Sequence[bool] | np.ndarray, stride: int = FRAMES_PER_LATENT
) -> list[CausalSpan]:
    """Cuts a clip into spans so that no latent frame shows both conditioning and generated frames.

    n conditioning frames in a row are a span of 1 + k strides, before it fewer than a stride of single frames;
    generated frames after them continue their span. Spans cover every frame, and may overlap the next one's begin or
    the clip's end.
    """
    conditioning = np.asarray(conditioning, bool)
    rounded = lambda frames: -(-frames // stride) * stride
    edges = np.flatnonzero(np.diff(conditioning)) + 1
    spans: list[CausalSpan] = []
    for begin, end in zip([0, *edges], [*edges, len(conditioning)], strict=True):
        begin, length = int(begin), int(end - begin)
        if conditioning[begin]:
            alone = (length - 1) % stride
            spans += [CausalSpan(begin + i, 1, stride) for i in range(alone)]
            spans.append(CausalSpan(begin + alone, length - alone, stride))
        elif spans:
            spans[-1] = CausalSpan(spans[-1].begin, spans[-1].frames + rounded(length), stride)
        else:
            spans.append(CausalSpan(0, 1 + rounded(length - 1), stride))
    return spans


def split_beside(conditioning: np.ndarray, stride: int) -> tuple[CausalSpan, list[CausalSpan]]:
    """A clip as one span, and its later conditioning frames beside it, as LTXConditionPipeline has them.

    Those in a row are a span of 1 + k strides; of what is less than a stride at their end (which that pipeline leaves
    out) the last frame is one too. At the clip's begin they are in its own span. A long row that doesn't begin where
    one of the clip's groups does is its first frame, and what follows from there on: most of it can be in the clip
    then (`canvas.put_beside`).
    """
    edges = [0, *(np.flatnonzero(np.diff(conditioning)) + 1).tolist(), len(conditioning)]
    whole = CausalSpan(0, 1 + -(-(len(conditioning) - 1) // stride) * stride, stride)
    spans = []
    for begin, end in itertools.pairwise(edges):
        if not conditioning[begin]:
            continue
        aligned = -(-begin // stride) * stride
        if begin < aligned and end - aligned > PREFIX * stride:
            spans.append(CausalSpan(begin, 1, stride))
            begin = aligned
        if begin:
            spans.append(CausalSpan(begin, 1 + (end - begin - 1) // stride * stride, stride))
        if (end - begin - 1) % stride:
            spans.append(CausalSpan(end - 1, 1, stride))
    return whole, spans


def frames_shown(spans: Sequence[CausalSpan], frames: int) -> list[np.ndarray]:
    """Which of a clip's `frames` each latent frame shows; those beyond the clip's end are its last."""
    return [
        np.minimum(np.arange(end if end == span.begin else end - span.stride + 1, end + 1), frames - 1)
        for span in spans
        for end in span.ends
    ]
