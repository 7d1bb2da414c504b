"""Checkpoints: as one, exact, and with a sentence where they can't be."""

import functools
import json
import shutil
from collections import namedtuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sora_jax.checkpoints.store import (
    CheckpointConfig,
    Checkpoints,
    checksums,
    keep_config,
    load_params,
    named_leaves,
    read_config,
)
from sora_jax.config import complete
from sora_jax.errors import UserError
from sora_jax.train import config_files
from sora_jax.train.objectives import schema_of


def make_trees(seed: int, width: int = 3):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "first": {
            "kernel": jax.random.normal(keys[0], (400, width)),
            "bias": jnp.arange(width, dtype=jnp.bfloat16),
        }
    }
    return {"params": params, "optimizer": (jnp.int32(seed), jax.random.normal(keys[1], (width, 700)))}


def templates(trees):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trees)


def make_iterator():
    return iter(grain.MapDataset.range(50).seed(1).shuffle().repeat().to_iter_dataset().batch(3))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def save_two(workdir):
    checkpoints, iterator = Checkpoints(workdir, CheckpointConfig(keep=2)), make_iterator()
    for step in (1, 2):
        next(iterator)
        checkpoints.save(step, make_trees(step), iterator)
    checkpoints.close()
    return next(iterator)


def test_restores_arrays_and_the_next_batch(tmp_path):
    following = save_two(tmp_path)
    iterator = make_iterator()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest == 2
    assert_same(checkpoints.restore(templates(make_trees(0)), iterator), make_trees(2))
    np.testing.assert_array_equal(next(iterator), following)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    trees = {"params": {"x": jnp.arange(1 << 20, dtype=jnp.float32)}}
    expected = np.arange(1 << 20, dtype=np.float32)
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints.save(1, trees, make_iterator())
    for _ in range(20):
        trees = scramble(trees)
    checkpoints.close()
    np.testing.assert_array_equal(load_params(tmp_path, ema=False)["x"], expected)


def test_keeps_the_last_and_the_milestones(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4))
    for step in range(1, 8):
        checkpoints.save(step, make_trees(step), make_iterator())
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


def test_another_architecture_names_the_first_parameter_and_both_shapes(tmp_path):
    save_two(tmp_path)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(
        UserError, match=r"params 'first/bias' has shape \(3,\) there and has shape \(5,\) here"
    ):
        checkpoints.restore(templates(make_trees(0, width=5)), make_iterator())
    other = {"params": make_trees(0)["params"] | {"second": jnp.zeros(2)}}
    with pytest.raises(UserError, match=r"params 'second' is absent there and has shape \(2,\) here"):
        checkpoints.restore(templates(other), make_iterator())
    fewer = {"params": {"first": {"bias": jnp.zeros(3, jnp.bfloat16)}}}
    with pytest.raises(
        UserError, match=r"params 'first/kernel' has shape \(400, 3\) there and is absent here"
    ):
        load_params(tmp_path, templates(fewer["params"]))


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_told_or_harmless(tmp_path, damage):
    save_two(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "checkpoints" / "2"
    shutil.copytree(folder, whole)
    checkpoints, expected = Checkpoints(tmp_path, CheckpointConfig()), {"params": make_trees(2)["params"]}
    told = 0
    files = [path for part in ("params", "data") for path in (whole / part).rglob("*") if path.is_file()]
    for file in [*files, whole / "_CHECKPOINT_METADATA"]:
        hurt, data = folder / file.relative_to(whole), bytearray(file.read_bytes())
        middle = len(data) // 2
        if damage == "delete":
            hurt.unlink()
        elif damage == "truncate":
            hurt.write_bytes(data[:middle])
        else:
            data[middle] ^= 0xFF
            hurt.write_bytes(data)
        try:
            trees = checkpoints.restore(templates(expected), make_iterator())
        except UserError as error:
            told += 1
            assert f"{folder}" in str(error), file
            assert "delete that folder to continue from step 1" in str(error), file
        else:
            assert_same(trees, expected)
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
    assert told >= 3
    checkpoints.close()
    shutil.rmtree(folder)
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(templates(make_trees(0)), make_iterator())
    assert_same(restored, make_trees(1))


def test_a_changed_place_in_the_data_is_told(tmp_path):
    save_two(tmp_path)
    place = tmp_path / "checkpoints" / "2" / "data" / "data.json"
    assert "6" in place.read_text()
    place.write_text(place.read_text().replace("6", "3"))
    with pytest.raises(UserError, match="the data's state is not what was saved"):
        Checkpoints(tmp_path, CheckpointConfig()).restore(templates(make_trees(0)), make_iterator())


def test_one_changed_bit_changes_its_sum():
    leaves = {"b": jnp.ones((3, 5), jnp.bfloat16), "a": jnp.zeros(7), "c": jnp.array([True, False])}
    before = checksums(leaves)
    flipped = leaves["a"].view(jnp.uint32).at[6].set(1).view(jnp.float32)
    assert checksums(leaves | {"a": flipped}) == before | {"a": before["a"] + 1}


def test_half_written_checkpoints_are_swept_away(tmp_path):
    save_two(tmp_path)
    rest = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "params"
    rest.mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest == 2
    assert not rest.parent.exists()


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    save_two(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(UserError, match="No space is left .* to continue from step 2"):
        checkpoints.save(3, make_trees(3), make_iterator())
    assert checkpoints.latest == 2


def test_a_workdir_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of its path is a file"):
        Checkpoints(tmp_path / "file", CheckpointConfig())


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no training run"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint: there is none yet"):
        load_params(tmp_path)


def test_names_of_leaves():
    assert list(named_leaves({"a": [jnp.zeros(1), {"b": jnp.zeros(1)}]})) == ["a/0", "a/1/b"]


def test_config_may_change_only_what_leaves_the_run_the_same(tmp_path):
    config = {"steps": 3, "log": {"every": 1}, "dit": {"width": 8, "sizes": (1, 2)}}
    keep_config(tmp_path, config, resumed=False)
    keep_config(tmp_path, config | {"steps": 9, "log": {"every": 2}}, resumed=True)
    assert read_config(tmp_path)["steps"] == 9
    with pytest.raises(UserError, match="dit.depth was absent and is 2; dit.width was 8 and is 16"):
        keep_config(tmp_path, config | {"dit": {"width": 16, "depth": 2, "sizes": (1, 2)}}, resumed=True)
    assert read_config(tmp_path)["dit"]["width"] == 8


@pytest.mark.parametrize("name", ["toyworld_dit", "toyworld_vae", "ladder"])
def test_a_run_of_before_a_key_was_filled_in_goes_on(tmp_path, name):
    """Older runs kept their configuration as it was written; today's have every key."""
    old = json.loads(ConfigDict(config_files.load(name)).to_json())
    fill = functools.partial(complete, schema_of(old))
    keep_config(tmp_path, old, resumed=False)
    assert "b2" not in read_config(tmp_path)["optim"]
    keep_config(tmp_path, fill(old).to_dict(), True, fill)
    assert read_config(tmp_path)["optim"]["b2"] == 0.99  # the run has every key from now on
    keep_config(tmp_path, fill(read_config(tmp_path)).to_dict(), True, fill)
    longer = {"steps": 10**6, "log": {"wandb": "x"}, "checkpoint": {"keep_every": 5}}
    keep_config(tmp_path, fill(old | longer).to_dict(), True, fill)
    for key, other, words in (("b2", 0.95, "b2 was 0.99 and is 0.95"), ("steps", 7, "steps was 0 and is 7")):
        changed = fill(old | {"optim": old["optim"] | {key: other}}).to_dict()
        with pytest.raises(UserError, match=rf"optim\.{words}"):
            keep_config(tmp_path, changed, True, fill)


def test_a_run_of_before_keys_were_renamed_goes_on(tmp_path):
    config = {"objective": "line", "steps": 3, "pipeline": {"rows": 2, "row_tokens": 64, "window": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    new = config | {"pipeline": {"batch_size": 2, "seq_len": 64, "num_packing_bins": 8}}
    assert read_config(tmp_path) == new
    keep_config(tmp_path, new, resumed=True)
    with pytest.raises(UserError, match=r"pipeline\.seq_len was 64 and is 32"):
        keep_config(tmp_path, new | {"pipeline": new["pipeline"] | {"seq_len": 32}}, resumed=True)
