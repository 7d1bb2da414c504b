"""Training on top of a diffusers folder: a LoRA learns, its base stays as it is, and runs go on exactly."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_finetune import tiny_config

import sora_jax
from sora_jax.checkpoints.store import load_params, named_leaves
from sora_jax.diffusion.flow import gather_sigmas
from sora_jax.distributed.mesh import WHOLE
from sora_jax.errors import UserError
from sora_jax.models.low_rank import with_lora
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.__main__ import run
from sora_jax.train.dit import add_noise
from sora_jax.train.finetune import FinetuneObjective, uncaption
from sora_jax.train.loop import make_steps
from sora_jax.train.loop_config import read_loop_config
from sora_jax.train.objectives import make_objective


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("finetune")


def objective_of(place: pathlib.Path, model: str = "wan", **changes) -> FinetuneObjective:
    return make_objective(tiny_config(place, 9, model, **changes), place / f"objective-{model}")


def first_batch(objective: FinetuneObjective) -> PackedBatch:
    batches = iter(objective.data(None, WHOLE))
    batch = next(batches)
    batches.close()
    return batch


@pytest.fixture(scope="module")
def lora(place):
    """An objective, and the batch of its four clips."""
    objective = objective_of(place)
    return objective, first_batch(objective)


@pytest.fixture(scope="module", params=["wan", "ltx"])
def any_lora(request, place, lora):
    """The same of each model."""
    if request.param == "wan":
        return lora
    objective = objective_of(place, request.param)
    return objective, first_batch(objective)


@pytest.mark.slow
def test_a_lora_overfits_four_clips_and_its_base_stays_as_it_is(place, any_lora):
    objective, batch = any_lora
    assert sorted(set(batch.segment_ids.flat)) == [1, 2, 3, 4]
    frozen, root = jax.tree.map(jnp.asarray, objective.frozen), jax.random.key(0)
    before = jax.tree.map(np.array, frozen["model"])
    init, step = make_steps(objective, read_loop_config(tiny_config(place, 9)).optim)
    state, step = jax.jit(init)(root), jax.jit(step, donate_argnums=0)
    losses, bar = [], {"Wan": 0.45, "LTX": 0.6}[type(objective.template).__name__]
    for _ in range(100):
        state, metrics = step(state, batch, root, frozen)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[:5]) > 2 and np.mean(losses[-20:]) < bar * np.mean(losses[:5])
    assert {name.rsplit("/", 1)[1] for name in named_leaves(state.params)} == {"lora_down", "lora_up"}
    jax.tree.map(np.testing.assert_array_equal, before, frozen["model"])


# Wan's scheduler shifts by 3; the logarithm of LTX-Video's is linear in tokens, 0.95 of 1024 and 2.05 of 4096.
SHIFT = {"Wan": 3.0, "LTX": np.exp(0.95 + 1.1 * (12 - 1024) / 3072)}


def test_the_loss_is_that_of_the_model_with_its_own_captions_and_its_own_shift(any_lora):
    """Text states as the encoder gives them, sigmas shifted as when twelve tokens are sampled."""
    objective, batch = any_lora
    objective = dataclass_like(objective, text_dropout=0.0)
    frozen, key = objective.frozen, jax.random.key(3)
    model = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape), objective.init(key))
    loss, _ = jax.jit(objective.loss)(model, batch, key, frozen)
    keys = jax.random.split(key, 3)
    drawn = jax.nn.sigmoid(jax.random.normal(keys[0], (1, 17)))
    shift = SHIFT[type(objective.template).__name__]
    noisy, target, sigma = add_noise(batch, shift * drawn / (1 + (shift - 1) * drawn), keys[1])
    whole = with_lora(frozen["model"], model, objective.lora)
    error = np.square(jax.jit(lambda m: m(noisy, batch, sigma))(whole) - target)
    np.testing.assert_allclose(loss, error.mean(), rtol=1e-5)
    assert gather_sigmas(sigma, batch.condition_ids).std() > 0.01


def dataclass_like(objective: FinetuneObjective, **flow) -> FinetuneObjective:
    """The same objective with sigmas drawn otherwise."""
    other = object.__new__(FinetuneObjective)
    vars(other).update(vars(objective), tuning=dataclasses.replace(objective.tuning, **flow))
    return other


def test_a_segment_without_caption_has_the_empty_prompts_state_in_place_of_each(lora):
    _, batch = lora
    ids = np.array([[1, 1, 1, 1, 1, 2, 2, 3, 0, 0]], np.int32)
    time = np.array([[0, 0, 0, 4, 4, 0, 0, 0, 0, 0]], np.float32)  # the first has two shots
    text = np.arange(20, dtype=np.float32).reshape(1, 10, 2)
    batch = dataclasses.replace(batch, text=text, text_segment_ids=ids, text_time=time)
    is_kept = np.array([[False, False, True, False]])
    seen = uncaption(batch, is_kept, np.full((1, 2), -1, np.float32))
    assert np.array(seen.text_segment_ids).tolist() == [[1, 0, 0, 1, 0, 2, 2, 3, 0, 0]]
    empty = (np.array(seen.text) == -1).all(-1)[0]
    assert empty[[0, 3, 7]].all() and not empty[[5, 6]].any()
    np.testing.assert_array_equal(seen.text[0, 5:7], text[0, 5:7])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wan", "ltx"])
def test_a_run_that_stopped_goes_on_to_the_same_updates(place, model):
    whole, parts = (place / f"{name}-{model}" for name in ("whole", "parts"))
    run(tiny_config(place, 5, model), whole)
    for steps in (2, 5):
        run(tiny_config(place, steps, model), parts)
    for ema in (True, False):
        one, other = (load_params(workdir, ema=ema) for workdir in (whole, parts))
        assert one.keys() == other.keys() and all("lora_" in name for name in one)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    moved = named_leaves(sora_jax.load(whole).dit)["blocks/qkv/kernel"]
    assert np.abs(moved - objective_of(place, model).frozen["model"].blocks.qkv.kernel[...]).max() > 0.01


def test_a_run_does_not_go_on_with_another_base(place, lora):
    objective, _ = lora
    kept = objective.workdir / "base.json"
    was = kept.read_text()
    kept.write_text(json.dumps({"transformer": "another"}))
    with pytest.raises(UserError, match="holds another transformer than the one that the run in"):
        objective.check()
    kept.write_text(was)


def test_clips_of_several_shapes_are_packed_and_each_is_alone(place):
    """A picture, clips of two lengths and two aspect ratios: latent frames of eight video frames."""
    shapes = {"data.aspects": "1:1,2:1", "data.durations": "0,1,2"}
    objective = objective_of(
        place, "ltx", **{key.replace(".", "__"): value for key, value in shapes.items()}, latents__clips="8"
    )
    batch = first_batch(objective)
    lengths = np.unique_counts(batch.segment_ids[batch.segment_ids > 0]).counts
    assert len(set(lengths.tolist())) > 1
    one = batch.segment_ids[0] == 1
    model, sigma = objective.frozen["model"], np.where(batch.condition_segment_ids > 0, 0.5, 0.0)
    changed = np.where(one[None, :, None], batch.patches, batch.patches + 1)
    run = jax.jit(lambda patches: model(patches, batch, jnp.float32(sigma)))
    np.testing.assert_allclose(run(batch.patches)[0, one], run(changed)[0, one], atol=1e-5)
    times = np.unique(batch.coords[batch.segment_ids > 0][:, 0])
    assert set(np.round(times * 16).astype(int)) <= {0, 8, 16, 24, 32} and times.max() >= 1


def test_a_model_that_is_trained_as_a_whole_begins_with_the_folders_weights(place, lora):
    objective = objective_of(place, lora__rank="0", optim__trainable="^patch_out/", optim__ema_decay="0")
    init, _ = make_steps(objective, read_loop_config(tiny_config(place, 9)).optim)
    initial = objective.initial
    state = jax.eval_shape(init, jax.random.key(0), initial)
    assert jax.tree.structure(state.params) == jax.tree.structure(objective.init(jax.random.key(0)))
    for leaf, frozen in zip(jax.tree.leaves(initial), jax.tree.leaves(lora[0].frozen["model"]), strict=True):
        np.testing.assert_array_equal(leaf, frozen)
    assert set(objective.frozen) == {"uncaptioned"}


def test_a_lora_is_trained_on_int8_weights_and_stays_beside_them(place):
    config = tiny_config(place, 2, transformer__weights="int8")
    run(config, place / "int8")
    dit = sora_jax.load(place / "int8", weights="int8").dit
    learned, leaves = load_params(place / "int8"), named_leaves(dit)
    assert leaves["blocks/up/kernel"].dtype == np.int8
    for name, value in learned.items():
        np.testing.assert_array_equal(leaves[name], value)
    assert sum(np.abs(value).max() > 0 for value in learned.values()) == len(learned)
    merged = named_leaves(sora_jax.load(place / "int8").dit)
    assert not any("lora" in name or name.endswith("kernel_scale") for name in merged)
    with pytest.raises(UserError, match="is a training run: export it first"):
        sora_jax.load(place / "int8", offload=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrained": ""}, "config.pretrained is empty: name a diffusers folder"),
        ({"pretrained": "nowhere/wan"}, "There is no model 'nowhere/wan'"),
        ({"pretrained": "toyworld"}, "toyworld is no diffusers pipeline"),
        ({"lora__targets": "to_q"}, "targets='to_q' is found in no layer's path: those are blocks/cross/kv"),
        ({"lora__rank": "64"}, "rank=64 is more than the 48×48 matrix 'blocks/cross/kv' has: set 48"),
        ({"lora__rank": "0", "transformer__weights": "bfloat16"}, "has float32 weights; set that"),
        ({"lora__rank": "0", "transformer__weights": "int8"}, "has float32 weights; set that"),
        ({"data__grid": "4,8,8"}, "is 4 frames of 16×16 pixels: set config.data.grid=4,16,16"),
        ({"text_tokens": "512"}, "A caption may have 512 tokens"),
        ({"model": "ltx", "data__grid": "4,32,32"}, "is 8 frames of 32×32 pixels: set config.data.grid=8,32"),
        ({"model": "ltx", "text_tokens": "64"}, "captions up to 128 tokens and attends to all: set"),
    ],
)
def test_what_can_not_be_trained_is_said_before_anything_is_encoded(place, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        objective_of(place, **changes).check()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("lora.targets", "(", "is no regular expression"),
        ("lora.rank", "-1", "must be at least 0"),
        ("pipeline.patch", "1,1,1", "config.pipeline.patch is the model's own"),
        ("flow.base_tokens", "8", "is no key of this configuration"),
    ],
)
def test_keys_that_it_does_not_take_are_answered(place, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        objective_of(place, **{key.replace(".", "__"): value})
