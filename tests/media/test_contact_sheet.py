"""A sheet shows every video, whole and labelled."""

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video


def test_contact_sheet_shows_every_video_in_its_proportions():
    videos = [
        Video(np.full((8, *size, 3), (200, 100, 50), np.uint8), 8) for size in ((36, 64), (64, 36), (48, 48))
    ]
    labels = ["a red ball bounces across a very wide field " * 9, "tall", "square"]
    sheet = contact_sheet(videos, labels, columns=2, frames_per_video=4, frame_height=40)
    pixels = np.asarray(sheet)
    assert (pixels == (200, 100, 50)).all(-1).sum() == 4 * 40 * (71 + 22 + 40)
    assert (pixels[:, :, 0] < 100).sum() > 200
    with pytest.raises(UserError, match="one label a video"):
        contact_sheet(videos, labels[:2], columns=2)
    # An ellipsis, not an overflow: nothing is drawn under the second strip's label.
    assert contact_sheet(videos[1:2], ["word " * 200], 1, frame_height=40).height < 130
