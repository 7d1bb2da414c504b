"""The optimizer's rules by hand: what decays, what Muon takes and how, the schedule, the average, accumulation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sora_jax.errors import UserError
from sora_jax.train.optim import (
    OptimConfig,
    decayed,
    ema_update,
    make_optimizer,
    make_schedule,
    orthogonalise,
    stop_frozen,
    update_rules,
)

PLAIN = OptimConfig(lr=0.1, warmup=0, schedule="constant", weight_decay=0, clip_norm=0)


class Weights(nnx.Module):
    """A module of random parameters with the given names and shapes."""

    def __init__(self, **shapes):
        rng = np.random.default_rng(len(shapes))
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(rng.standard_normal(shape, np.float32)))


class Model(nnx.Module):
    """Every kind of parameter that the models here have."""

    def __init__(self):
        self.patch_in = Weights(kernel=(3, 4), bias=(4,))
        self.blocks = Weights(qk_scale=(2, 2, 3))
        self.blocks.qkv = Weights(kernel=(2, 4, 6), bias=(2, 6))
        self.layers = nnx.List([Weights(kernel=(3, 3, 3, 2, 3), bias=(3,))])


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def by_name(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in leaves
    }


def gradients_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)


def take_steps(optimizer, params, gradients):
    """The parameters after one step for each tree of `gradients`."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def apply_steps(config, params, gradients):
    return take_steps(make_optimizer(config, params), params, gradients)


def test_rules_follow_names_and_shapes(model):
    matrices = {"patch_in/kernel", "blocks/qkv/kernel", "layers/0/kernel"}
    assert {name for name, decays in by_name(decayed(model)).items() if decays} == matrices
    assert {name for name, rule in by_name(update_rules(model)).items() if rule == "muon"} == {
        "blocks/qkv/kernel",
        "layers/0/kernel",
    }
    assert by_name(decayed(nnx.state(model))) == by_name(decayed(model))


def test_plain_dicts_follow_the_same_rules():
    params = {
        "layers": {"value": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))},
        "embedding": jnp.ones((3, 4)),
        "heads": jnp.ones((3, 4, 5)),
    }
    assert by_name(update_rules(params)) == {
        "layers": "muon",
        "layers/scale": "adamw",
        "layers/bias": "adamw",
        "embedding": "adamw",
        "heads": "adamw",
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_alone(name, model):
    config = dataclasses.replace(PLAIN, name=name, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, model)
    after = by_name(apply_steps(config, model, [zeros]))
    for path, before in by_name(model).items():
        kept = 1 - 0.1 * 0.5 if path.endswith("kernel") else 1
        np.testing.assert_allclose(after[path], kept * before, rtol=1e-6)


def test_adamw_by_hand(model):
    config = dataclasses.replace(PLAIN, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, lr=0.01)
    after = by_name(apply_steps(config, model, [gradients_like(model, seed) for seed in range(3)]))
    start = by_name(model)
    for path, decay in {"patch_in/kernel": 0.2, "patch_in/bias": 0.0}.items():
        p, m, v = np.asarray(start[path], np.float64), 0.0, 0.0
        for t in range(1, 4):
            g = np.asarray(by_name(gradients_like(model, t - 1))[path], np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            p = p - 0.01 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + decay * p)
        np.testing.assert_allclose(after[path], p, rtol=1e-5, atol=1e-6)


@functools.cache
def muon_of_stack(shape):
    """A compiled function from (start, gradients) to parameters."""
    config = dataclasses.replace(PLAIN, name="muon", weight_decay=0.1, momentum=0.8)

    def tree(stack):
        return {"blocks": {"w": stack}}

    def together(start, gradients):
        return take_steps(stacked, tree(start), [tree(gradient) for gradient in gradients])["blocks"]["w"]

    stacked = make_optimizer(config, tree(jnp.zeros(shape)))
    return jax.jit(together)


# No shrinking: a seed says little.
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(shape=st.sampled_from([(3, 4, 7), (2, 7, 4)]), seed=st.integers(0, 999))
def test_muon_takes_a_stack_layer_by_layer(shape, seed):
    together, alone = muon_of_stack(shape), muon_of_stack((1, *shape[1:]))
    start, *gradients = np.random.default_rng(seed).standard_normal((3, *shape), np.float32)
    # Layers whose gradients differ in size by a thousand, which a shared norm would drown.
    gradients = [gradient / 1000.0 ** np.arange(shape[0])[:, None, None] for gradient in gradients]
    stack = together(start, gradients)
    for layer in range(shape[0]):
        part = slice(layer, layer + 1)
        by_itself = alone(start[part], [gradient[part] for gradient in gradients])
        np.testing.assert_allclose(stack[part], by_itself, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (432, 16), (16, 16)])
def test_orthogonalising_is_newton_schulz(shape):
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    coefficients = jnp.array([3.4445, -4.7750, 2.0315])
    expected = optax.contrib._muon.orthogonalize_via_newton_schulz(matrix, coefficients)
    np.testing.assert_allclose(orthogonalise(matrix), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 12, 8)])
def test_muon_steps_are_orthogonal_and_of_adams_size(shape):
    params = {"blocks": {"w": jnp.zeros(shape)}}
    config = dataclasses.replace(PLAIN, name="muon")
    after = apply_steps(config, params, [gradients_like(params)])["blocks"]["w"]
    for layer in after / -config.lr:
        singular = np.linalg.svd(np.asarray(layer), compute_uv=False)
        expected = 0.2 * math.sqrt(12)
        np.testing.assert_array_less(expected * 0.6, singular)
        np.testing.assert_array_less(singular, expected * 1.3)
        assert 0.12 < float(jnp.sqrt(jnp.mean(layer**2))) < 0.25


def test_muon_takes_a_convolution_as_one_matrix(model):
    config = dataclasses.replace(PLAIN, name="muon")
    kernel = model.layers[0].kernel[...]
    gradients = gradients_like(model)
    conv = by_name(apply_steps(config, model, [gradients]))["layers/0/kernel"] - kernel
    flat = {"blocks": {"w": kernel.reshape(1, -1, kernel.shape[-1])}}
    flat_gradients = {
        "blocks": {"w": by_name(gradients)["layers/0/kernel"].reshape(flat["blocks"]["w"].shape)}
    }
    matrix = apply_steps(config, flat, [flat_gradients])["blocks"]["w"] - flat["blocks"]["w"]
    np.testing.assert_allclose(conv.reshape(matrix.shape), matrix, atol=1e-5)


def test_muon_leaves_the_rest_to_adamw(model):
    gradients = [gradients_like(model, seed) for seed in range(3)]
    adamw = by_name(apply_steps(PLAIN, model, gradients))
    muon = by_name(apply_steps(dataclasses.replace(PLAIN, name="muon"), model, gradients))
    rules = by_name(update_rules(model))
    assert {path for path in muon if np.allclose(muon[path], adamw[path], atol=1e-6)} == {
        path for path, rule in rules.items() if rule == "adamw"
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_mean_gradient_is_kept_in_the_type_that_is_asked_for(name, model):
    kept = {
        dtype: make_optimizer(dataclasses.replace(PLAIN, name=name, momentum_dtype=dtype), model).init(model)
        for dtype in ("float32", "bfloat16")
    }
    bits = {dtype: sum(x.nbytes for x in jax.tree.leaves(state)) for dtype, state in kept.items()}
    assert bits["bfloat16"] < 0.8 * bits["float32"]
    assert {x.dtype.name for x in jax.tree.leaves(kept["float32"])} <= {"float32", "int32"}
    optimizer = make_optimizer(dataclasses.replace(PLAIN, name=name, momentum_dtype="bfloat16"), model)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, model), kept["bfloat16"], model)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}


def test_muon_without_hidden_matrices_is_refused():
    with pytest.raises(UserError, match="choose 'adamw'"):
        make_optimizer(OptimConfig(name="muon"), {"w": jnp.ones((3, 4)), "bias": jnp.ones(4)})


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1, 1)]
)
def test_schedule(schedule, middle, end):
    config = OptimConfig(lr=2.0, warmup=10, steps=110, schedule=schedule, final_lr_fraction=0.2)
    rates = np.asarray(jax.jit(make_schedule(config))(jnp.arange(200)))
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[[60, 110, 199]], 2.0 * np.array([middle, end, end]), rtol=1e-5)
    assert np.all(np.diff(rates[10:]) <= 1e-6)
    assert float(make_schedule(OptimConfig(lr=3.0, warmup=0))(0)) == pytest.approx(3.0)


def test_clipping_bounds_the_global_norm():
    # An epsilon far above the gradient makes Adam linear in it.
    config = dataclasses.replace(PLAIN, lr=1.0, eps=1e6)
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    gradients = jax.tree.map(lambda x: x + 100.0, params)
    clipped = apply_steps(dataclasses.replace(config, clip_norm=0.5), params, [gradients])
    assert float(optax.tree.norm(clipped)) * 1e6 == pytest.approx(0.5, rel=1e-3)
    free = apply_steps(config, params, [gradients])
    assert float(optax.tree.norm(free)) * 1e6 == pytest.approx(100 * math.sqrt(7), rel=1e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulated_batches_are_one_batch_of_their_mean(name):
    params = {"blocks": {"w": jnp.ones((2, 3, 4))}, "b": jnp.ones(3)}
    config = dataclasses.replace(PLAIN, name=name, schedule="linear", steps=6, final_lr_fraction=0.0)
    optimizer = make_optimizer(dataclasses.replace(config, accumulate=3), params)
    state, accumulated = optimizer.init(params), params
    update = jax.jit(optimizer.update)
    parts = [gradients_like(params, seed) for seed in range(3)]
    for index, part in enumerate(parts):
        updates, state = update(part, state, accumulated)
        accumulated = optax.apply_updates(accumulated, updates)
        if index < 2:
            jax.tree.map(np.testing.assert_array_equal, accumulated, params)
    # The step follows the third batch, of whose learning rate 4/6 is left.
    mean = jax.tree.map(lambda *x: sum(x) / 3, *parts)
    once = apply_steps(dataclasses.replace(config, schedule="constant", lr=0.1 * 4 / 6), params, [mean])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), accumulated, once)


def test_a_ramp_of_the_batch_is_one_program():
    """Updates of 1, 2 and 4 batches, each their mean at the learning rate of the last; Adam is linear here."""
    config = dataclasses.replace(
        PLAIN, b1=0.0, b2=0.0, eps=1e6, schedule="linear", steps=20, final_lr_fraction=0
    )
    config = dataclasses.replace(config, accumulate_doubles=(3, 6))
    params = {"w": jnp.zeros(5)}
    optimizer = make_optimizer(config, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    parts = [gradients_like(params, seed)["w"] for seed in range(16)]
    taken = {}
    for batch, part in enumerate(parts):
        updates, state = update({"w": part}, state, params)
        if np.any(updates["w"]):
            taken[batch] = updates["w"]
    assert list(taken) == [0, 1, 2, 4, 6, 10, 14] and update._cache_size() == 1
    begin = 0
    for last, own in taken.items():
        mean = sum(parts[begin : last + 1]) / (last + 1 - begin)
        rate = 0.1 * (1 - last / 20) / 1e6
        np.testing.assert_allclose(own, -rate * mean, rtol=1e-4)
        begin = last + 1


def test_average_warms_up_and_then_decays(model):
    ones = jax.tree.map(jnp.ones_like, model)
    zeros = jax.tree.map(jnp.zeros_like, model)
    update = jax.jit(ema_update, static_argnums=2)
    for step, kept in ((0, 0.1), (10, 11 / 20), (10_000, 0.99)):
        for leaf in jax.tree.leaves(update(ones, zeros, 0.99, step)):
            np.testing.assert_allclose(leaf, kept, rtol=1e-5)
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    averaged = ema_update({"w": jnp.zeros(3)}, half, 0.9999, 10**6)
    assert averaged["w"].dtype == jnp.float32
    np.testing.assert_allclose(averaged["w"], 1e-4, rtol=1e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learns_a_regression(name, model):
    target = np.random.default_rng(1).standard_normal((2, 4, 6), np.float32)

    def loss(model):
        return jnp.mean((model.blocks.qkv.kernel[...] - target) ** 2)

    config = OptimConfig(name=name, lr=0.3, warmup=5, steps=60, weight_decay=0)
    optimizer = make_optimizer(config, model)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = model, optimizer.init(model)
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.1 * float(loss(model))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"schedule": "step"},
        {"lr": 0.0},
        {"steps": 0},
        {"warmup": -1},
        {"final_lr_fraction": 1.5},
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"ema_decay": 1.0},
        {"accumulate": 0},
        {"accumulate_doubles": (0,)},
        {"accumulate_doubles": (6, 3)},
    ],
)
def test_wrong_settings_are_refused(wrong):
    (field,) = wrong
    with pytest.raises(UserError, match=f"config.optim.{field}=.* must be"):
        OptimConfig(**wrong)


def test_what_is_not_trainable_stays(model):
    """The rest moves as it does without the field; the frozen part has no state, and its gradient isn't needed."""
    gradients = jax.tree.map(jnp.ones_like, model)
    everything = dataclasses.replace(PLAIN, name="muon", weight_decay=0.5)
    part = dataclasses.replace(everything, trainable="^(blocks|patch_in/kernel)")
    updates = []
    for config in (everything, part):
        optimizer = make_optimizer(config, model)
        update, state = optimizer.update(gradients, optimizer.init(model), model)
        updates.append(by_name(update))
        kept = [x.size for x in jax.tree.leaves(state) if x.shape == (3, 3, 3, 2, 3)]
        assert len(kept) == (config is everything)
    for name, update in updates[1].items():
        if name.startswith(("blocks", "patch_in/kernel")):
            np.testing.assert_array_equal(update, updates[0][name], err_msg=name)
            assert np.any(update)
        else:
            assert not np.any(update), name


def test_a_frozen_part_costs_no_backward_pass(model):
    """Its gradient is left out of the compiled program."""

    def gradients(config, model, x):
        loss = lambda model: jnp.sum(
            jnp.square((x @ model.patch_in.kernel[...]) @ model.blocks.qkv.kernel[0])
        )
        return jax.grad(lambda model: loss(stop_frozen(config, model)))(model)

    flops = [
        jax.jit(functools.partial(gradients, dataclasses.replace(PLAIN, trainable=pattern)))
        .lower(model, jnp.ones((256, 3)))
        .compile()
        .cost_analysis()["flops"]
        for pattern in ("", "^blocks")
    ]
    assert flops[1] < 0.7 * flops[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": "decoder("}, "no regular expression"),
        ({"trainable": "decoder"}, "nothing would be learned"),
        ({"trainable": "^patch_in", "name": "muon"}, "no hidden matrices"),
    ],
)
def test_a_choice_that_trains_nothing_is_refused(model, changes, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(dataclasses.replace(PLAIN, **changes), model)
