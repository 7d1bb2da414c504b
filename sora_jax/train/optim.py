"""The optimizer: AdamW, or Muon for hidden matrices with AdamW for the rest; schedule, clipping, averaging.

Which parameter is treated how follows from its path and shape, by the conventions that all models here keep:

- a parameter below `blocks` or `layers` (unless that is a list) is stacked: its first axis is L, one slice a
  layer, and no part of its shape;
- names that end in `bias` or `scale` are no matrices, of any shape;
- matrices are what else has two axes or more, the last one being the output. **Weight decay** acts on them
  alone;
- **Muon** takes hidden matrices: stacked ones [L, in, out], each layer by itself, and convolution kernels
  [..., in, out] of four axes or more, as one matrix of all their inputs by their outputs. Unstacked [in, out]
  matrices are the projections in and out of a model and embeddings: those go to AdamW, as Muon's authors advise.

Sources: AdamW, Loshchilov & Hutter 2019 (arXiv:1711.05101). Muon, Jordan et al. 2024, scaled to AdamW's size of
step so that one learning rate serves both, Liu et al. 2025 (arXiv:2502.16982).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax.config import COUNT, FROM_ZERO, SHARE, check_ranges
from sora_jax.distributed.mesh import platform
from sora_jax.errors import UserError

Tree = TypeVar("Tree")

# Of paths such as blocks/qkv/bias/value; the keys of a list are numbers, and an NNX parameter's last is `value`.
_STACKED = re.compile(r"(^|/)(blocks|layers)/(?!\d+(/|$))")
_VECTOR = re.compile(r"(bias|scale)(/value)?$")
_SCHEDULES, _MOMENTUM_DTYPES = ("cosine", "linear", "constant"), ("float32", "bfloat16")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MUON_RMS = 0.2  # AdamW's usual root mean square of an update before the learning rate


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters follow their gradients. All counts are in calls of `update`, that is, in batches.

    Attributes:
      name: `"adamw"` or `"muon"`.
      lr: the highest learning rate.
      warmup: steps of linear rise to `lr`.
      schedule: after it `"cosine"`, `"linear"` or `"constant"`, over `steps` in all.
      steps: after which the schedule has ended; in a run's configuration 0 means all of the run.
      final_lr_fraction: what is left of `lr` at the end; `"constant"` doesn't read it.
      b1, b2, eps: AdamW's.
      momentum: Muon's.
      momentum_dtype: what the mean gradient (AdamW's first moment, Muon's trace) is kept in; "bfloat16" halves it.
        All else is float32.
      weight_decay: of matrices, times the learning rate of the moment.
      clip_norm: the gradient's largest global norm; 0: no clipping.
      ema_decay: of the average of the parameters (`ema_update`); 0: none is kept.
      ema_lengths: relative lengths σ_rel of two power-function averages, such as (0.05, 0.1), instead of that one: of
        their snapshots an average of another length is made after training (`train.averages`); the first is the one
        that is measured and sampled from. Empty: none.
      ema_every: steps between snapshots of those two in the workdir; the last step always has one.
      accumulate: batches whose mean gradient makes one update.
      accumulate_doubles: counts of batches, rising, after each of which `accumulate` doubles, from the next update on:
        a ramp of the batch. Empty: it stays.
      trainable: regular expression, searched in each parameter's path (`decoder/1/0/first/kernel`): what it isn't
        found in stays as it is, without gradient, decay or state; empty: all parameters learn.
      offload: keeps the optimizer's state in the host's memory between updates. It comes to the devices for each,
        and goes back: that costs time, and buys room where parameters and activations leave too little. A CPU's
        devices have no memory of their own, so there it changes nothing.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    warmup: int = 100
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    steps: int = 10_000
    final_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    ema_lengths: tuple[float, ...] = ()
    ema_every: int = 1000
    accumulate: int = 1
    accumulate_doubles: tuple[int, ...] = ()
    trainable: str = ""
    offload: bool = False

    def __post_init__(self) -> None:
        from_0 = dict.fromkeys(("warmup", "weight_decay", "clip_norm"), FROM_ZERO)
        check_ranges(
            self, "optim", steps=COUNT, accumulate=COUNT, ema_every=COUNT, final_lr_fraction=SHARE, **from_0
        )
        lengths, doubles = self.ema_lengths, self.accumulate_doubles
        for field, allowed, words in (
            ("name", self.name in ("adamw", "muon"), "'adamw' or 'muon'"),
            ("schedule", self.schedule in _SCHEDULES, "'cosine', 'linear' or 'constant'"),
            ("lr", self.lr > 0, "more than 0"),
            ("momentum_dtype", self.momentum_dtype in _MOMENTUM_DTYPES, "'float32' or 'bfloat16'"),
            ("b1", 0 <= self.b1 < 1, "from 0 to below 1"),
            ("b2", 0 <= self.b2 < 1, "from 0 to below 1"),
            ("eps", self.eps > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
            (
                "ema_lengths",
                not lengths or (len(lengths) == 2 and 0.01 <= lengths[0] < lengths[1] <= 0.25),
                "empty, or two lengths from 0.01 to 0.25, the shorter one first",
            ),
            (
                "accumulate_doubles",
                all(a < b for a, b in zip((0, *doubles), doubles)),
                "counts of batches from 1, each above the one before",
            ),
        ):
            if not allowed:
                raise UserError(f"config.optim.{field}={getattr(self, field)!r} must be {words}.")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise UserError(
                f"config.optim.trainable={self.trainable!r} is no regular expression ({error}): write part of a "
                "parameter's path, such as '^(decoder|up)/'."
            ) from None


def make_schedule(config: OptimConfig) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate by step (from 0): its rise, its fall, and constant after `config.steps`."""

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(config.warmup, 1))
        done = jnp.clip((step - config.warmup) / max(config.steps - config.warmup, 1), 0.0, 1.0)
        left = {
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
            "linear": 1 - done,
            "constant": jnp.ones_like(done),
        }
        final = config.final_lr_fraction
        return config.lr * rise * (final + (1 - final) * left[config.schedule])

    return schedule


def make_optimizer(config: OptimConfig, params: Any) -> optax.GradientTransformation:
    """Builds the whole chain: clipping, AdamW or Muon, weight decay, learning rate, accumulation.

    Args:
      config: its numbers.
      params: the parameters' pytree (an NNX module will do); read for names and shapes alone.

    Raises:
      UserError: `config.name` is `"muon"` and what is trained has no hidden matrix; or nothing is trained.
    """
    learns = trainable(config, params)
    if not any(jax.tree.leaves(learns)):
        raise UserError(
            f"config.optim.trainable={config.trainable!r} is found in no parameter's path, of which the first is "
            f"'{_path(jax.tree_util.tree_leaves_with_path(params)[0][0])}': nothing would be learned."
        )
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.momentum_dtype)
    direction = adam
    if config.name == "muon":
        rules = zip(jax.tree.leaves(update_rules(params)), jax.tree.leaves(learns), strict=True)
        if ("muon", True) not in rules:
            raise UserError(
                "The optimizer is 'muon' and what is trained has no hidden matrices (stacked ones below 'blocks' or "
                "'layers', or convolution kernels): choose 'adamw'."
            )
        muon = optax.chain(
            optax.trace(config.momentum, nesterov=True, accumulator_dtype=config.momentum_dtype),
            optax.stateless(lambda updates, _: jax.tree.map_with_path(_muon, updates)),
        )
        # The function, not its result: that is a tree of the model's own type, which optax would call.
        direction = optax.partition({"muon": muon, "adamw": adam}, update_rules)

    schedule = make_schedule(config)
    # The counter of an accumulating optimizer counts updates; the learning rate is that of the update's last batch.
    batches_of, batches_until = make_ramp(config)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(lambda update: schedule(batches_until(update) - 1)),
    )
    if config.trainable:
        rule = lambda tree: jax.tree.map(lambda on: "train" if on else "freeze", trainable(config, tree))
        chain = optax.partition({"train": chain, "freeze": optax.set_to_zero()}, rule)
    if config.accumulate > 1 or config.accumulate_doubles:
        return optax.MultiSteps(chain, batches_of).gradient_transformation()
    return chain


def make_ramp(
    config: OptimConfig,
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """How many batches an update takes, and how many there are until its end, by its number from 0."""
    sizes = config.accumulate * 2 ** np.arange(len(config.accumulate_doubles) + 1)
    updates, batches = [0], [0]  # where each size begins
    for size, end in zip(sizes, config.accumulate_doubles):
        count = max(math.ceil((end - batches[-1]) / size), 0)
        updates.append(updates[-1] + count)
        batches.append(batches[-1] + count * int(size))
    stage = lambda update: jnp.sum(update >= np.array(updates)) - 1
    look_up = lambda table, update: jnp.asarray(table, jnp.int32)[stage(update)]

    def batches_until(update: jax.Array) -> jax.Array:
        done = (update + 1 - look_up(updates, update)) * look_up(sizes, update)
        return look_up(batches, update) + done

    return functools.partial(look_up, sizes), batches_until


def trainable(config: OptimConfig, params: Tree) -> Tree:
    """For each parameter whether it learns (`OptimConfig.trainable`)."""
    pattern = re.compile(config.trainable)
    return jax.tree.map_with_path(lambda path, _: bool(pattern.search(_path(path))), params)


def stop_frozen(config: OptimConfig, params: Tree) -> Tree:
    """The parameters, for a loss whose gradient is 0 where nothing is learned: neither computed nor prepared for."""
    if not config.trainable:
        return params
    learns = trainable(config, params)
    return jax.tree.map(lambda on, x: x if on else jax.lax.stop_gradient(x), learns, params)


def decayed(params: Tree) -> Tree:
    """For each parameter whether weight decay acts on it: on matrices alone."""
    return jax.tree.map_with_path(_is_matrix, params)


def update_rules(params: Tree) -> Tree:
    """For each parameter the rule that a `"muon"` optimizer follows: `"muon"` or `"adamw"`."""

    def rule(path: jax.tree_util.KeyPath, x: jax.Array) -> str:
        axes = x.ndim - _stack_axes(path)
        hidden = axes >= 4 or (axes == 2 and x.ndim == 3)  # three axes could mean either
        return "muon" if _is_matrix(path, x) and hidden else "adamw"

    return jax.tree.map_with_path(rule, params)


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.typing.ArrayLike) -> Tree:
    """The exponential moving average of the parameters after one more step.

    The decay is at most (1 + step) / (10 + step), so that the random start is soon forgotten.

    Args:
      ema: the average so far, best in float32; begins as a copy of `params`.
      params: the parameters now.
      decay: the part of `ema` that stays, once warmed up.
      step: steps done before this one, from 0.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: (e + rate * (p.astype(jnp.float32) - e)).astype(e.dtype), ema, params)


def _path(path: jax.tree_util.KeyPath) -> str:
    """As "blocks/qkv/bias/value"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _stack_axes(path: jax.tree_util.KeyPath) -> int:
    """1 if the parameter at `path` leads with an L axis, else 0."""
    return int(bool(_STACKED.search(_path(path))))


def _is_matrix(path: jax.tree_util.KeyPath, x: jax.Array) -> bool:
    vector = _VECTOR.search(_path(path))
    return not vector and x.ndim - _stack_axes(path) >= 2


def _muon(path: jax.tree_util.KeyPath, update: jax.Array) -> jax.Array:
    """Muon's step for one parameter: each of its matrices made orthogonal, at AdamW's size."""
    stack = _stack_axes(path)
    width_in, width_out = math.prod(update.shape[stack:-1]), update.shape[-1]
    matrices = update.reshape(-1, width_in, width_out)
    # An orthogonal [in, out] matrix has the root mean square 1/√max(in, out).
    size = _MUON_RMS * math.sqrt(max(width_in, width_out))
    return size * orthogonalise(matrices).reshape(update.shape)


def orthogonalise(matrices: jax.Array) -> jax.Array:
    """The nearest semi-orthogonal matrix of each [..., m, n], float32, singular values within about 0.7 to 1.2.

    Newton-Schulz iterations with Jordan's coefficients, X ← (aI + bXXᵀ + c(XXᵀ)²)X. A matrix of any size in
    float32's range gives the same; singular values far below the largest, 0 among them, stay small.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT
    x = matrices.astype(jnp.float32)
    # By its largest number first: squares of what is far from 1 would leave float32's range.
    x /= jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), jnp.finfo(jnp.float32).tiny)
    x /= jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1.0)
    return newton_schulz_gram(x) if platform() == "cpu" else newton_schulz(x)


def newton_schulz(x: jax.Array) -> jax.Array:
    """Five iterations as they are written, of float32[..., m, n] of norm 1 with m ≤ n.

    Accelerators round the operands of products, to bfloat16 or TF32, unless a precision is named. Here that does no
    harm: an error is taken up by the next iteration. So the products keep the speed of the machine's own precision.
    """
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def newton_schulz_gram(x: jax.Array) -> jax.Array:
    """The same of exact products, with less work: for CPUs, which round nothing.

    As every factor is a polynomial of the first XXᵀ, they commute: the iteration runs on the small square side
    alone, and the long side is touched twice. For a convolution's 4320×160 matrix that is a fifth of the work.
    Rounded, XXᵀ gets eigenvalues below 0, which every iteration makes twelve times as large: hence the named
    precision.
    """
    a, b, c = _NEWTON_SCHULZ
    product = lambda p, q: jnp.matmul(p, q, precision="highest")
    gram = product(x, x.mT)
    identity = jnp.eye(x.shape[-2])
    polynomial = identity
    for _ in range(5):
        factor = a * identity + b * gram + c * product(gram, gram)
        polynomial = product(factor, polynomial)
        gram = product(product(factor, gram), factor)
    return product(polynomial, x)
