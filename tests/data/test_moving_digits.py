"""Moving MNIST: digits stay within the frame, move and bounce as told, and held-out ones are never trained on."""

import numpy as np
import pytest

from sora_jax.data.data_config import DataConfig
from sora_jax.data.moving_digits import HELD_OUT, STEP, MovingDigits, draw_path
from sora_jax.data.sources import heldout_sources, make_sources
from sora_jax.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Twenty digits: squares of 28 pixels, each of a brightness of its own."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, digits=np.broadcast_to(np.arange(1, 21, dtype=np.uint8)[:, None, None], (20, 28, 28)))
    return path


def test_a_path_keeps_its_speed_and_turns_round_at_the_sides():
    for seed in range(50):
        path = draw_path(np.random.default_rng(seed), 60)
        assert (path >= 0).all() and (path <= 1).all()
        speed = np.abs(np.diff(path, axis=0)).max(0)
        np.testing.assert_allclose(np.hypot(*speed), STEP)
        for side, v in zip(path.T, speed, strict=True):
            way = np.diff(side)
            at_side = (side == 0) | (side == 1)
            # A step is a whole one but where it ends at a side, and goes on as before but where it begins at one.
            np.testing.assert_allclose(np.abs(way[~at_side[1:]]), v)
            before, after = way[:-1], way[1:]
            assert (np.sign(before) == np.sign(after))[~at_side[1:-1]].all()
            assert (np.sign(after) == np.where(side[1:-1] == 0, 1, -1))[at_side[1:-1]].all()


def test_clips_depend_on_seed_split_and_index_alone(path):
    first, again = (MovingDigits(path, seed=3, clips=clips) for clips in (4, 9))
    np.testing.assert_array_equal(first[2].video.frames, again[2].video.frames)
    others = [
        MovingDigits(path, seed=4)[2],
        MovingDigits(path, "validation", seed=3)[2],
        MovingDigits(path, "heldout", seed=3)[2],
        again[3],
    ]
    assert all((other.video.frames != first[2].video.frames).any() for other in others)
    with pytest.raises(IndexError):
        first[4]


def test_two_whole_digits_are_laid_over_each_other_by_their_brightest(path):
    source = MovingDigits(path, "validation", clips=30)
    held_out = {HELD_OUT, 2 * HELD_OUT}  # brightness of every tenth
    for index in range(30):
        for frame in source[index].video.frames:
            assert (frame == frame[..., :1]).all()
            shown = set(np.unique(frame)) - {0}
            assert shown <= held_out
            brightest = frame[..., 0] == max(shown)
            # The brightest one is whole, and the other is seen wherever that isn't.
            rows, columns = np.flatnonzero(brightest.any(1)), np.flatnonzero(brightest.any(0))
            assert len(rows) >= 28 and len(columns) >= 28
            if len(shown) == 2:
                assert brightest.sum() == 28 * 28
                assert np.isin(rows, np.arange(rows[0], rows[0] + 28)).all()


def test_digits_of_training_and_of_the_other_splits_are_disjoint(path):
    train, test = MovingDigits(path), MovingDigits(path, "heldout")
    assert len(train.digits) == 18 and len(test.digits) == 2
    assert not set(train.digits[:, 0, 0]) & set(test.digits[:, 0, 0])
    assert train.contents() != test.contents()


def test_a_configuration_names_the_file(path):
    config = DataConfig(source=str(path), durations=(3.0,))
    [(source, weight)] = make_sources(config)
    assert isinstance(source, MovingDigits) and weight == 1
    assert source[0].video.frames.shape == (25, 64, 64, 3)
    [(held_out, _)] = heldout_sources(config, 5)
    assert len(held_out) == 5 and len(held_out.digits) == 2


def test_a_file_that_holds_no_digits_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    np.savez(tmp_path / "b.npz", digits=np.zeros((20, 28, 28)))
    (tmp_path / "c.npz").write_text("no archive")
    np.savez(tmp_path / "d.npz", digits=np.zeros((20, 28, 28), np.uint8))
    (tmp_path / "e.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:200])  # cut off
    np.save(tmp_path / "f.npy", np.zeros(3))
    (tmp_path / "f.npy").rename(tmp_path / "f.npz")
    for name in "acef":
        with pytest.raises(UserError, match="can't be read as a file of digits"):
            MovingDigits(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="float64"):
        MovingDigits(tmp_path / "b.npz")
    with pytest.raises(UserError, match="don't fit"):
        MovingDigits(tmp_path / "d.npz", shapes=((5, 16, 64, 8.0),))
