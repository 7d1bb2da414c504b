"""Windows of time: every latent frame is decoded once, in order, with what the decoder needs around it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.models.decode_windows import Windows, split_windows


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 5))
def test_each_latent_frame_is_decoded_once_amid_its_neighbours(count, frames, overlap):
    own = []
    for window, start, end in split_windows(iter(np.arange(count)), Windows(frames, overlap)):
        assert len(window) == min(count, frames + 2 * overlap + 1) and (np.diff(window) == 1).all()
        # One more before, but at the clip's begin; as many after, but at its end.
        assert window[0] == 0 or start > overlap
        assert window[-1] == count - 1 or len(window) - end >= overlap
        own += window[start:end].tolist()
    assert own == list(range(count))


def test_no_more_is_read_than_the_next_window_needs():
    read = []
    latents = (read.append(number) or np.float32(number) for number in range(100))
    next(split_windows(latents, Windows(4, 2)))
    assert len(read) == 4 + 2 * 2 + 1 + 4


def test_of_nothing_there_is_no_window():
    assert list(split_windows(iter(()), Windows(2, 1))) == []


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_windows_that_cover_nothing_are_refused(numbers):
    with pytest.raises(UserError, match="latent frames at a time"):
        Windows(*numbers)
