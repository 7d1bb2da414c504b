"""Programs at an accelerator's default precision, on a CPU.

Unless a precision is named, TPUs round the operands of float32 products to bfloat16 and GPUs to TF32; CPUs don't, and
never show what that does. Here a program is traced, and the operands of every product are rounded in it that an
accelerator would round: of `dot_general` and `conv_general_dilated`, wherever they are, in loops, branches,
derivatives, checkpoints and parts of a mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as core
import jax.numpy as jnp
from jax.extend.core import primitives

BITS = {"bfloat16": 7, "tf32": 10}  # of the mantissa; both have float32's exponent
PRODUCTS = ("dot_general", "conv_general_dilated")


@functools.cache
def rounded(function: Callable[..., Any], to: str) -> Callable[..., Any]:
    """`function`, compiled, with the operands of its products rounded to "bfloat16" or "tf32" (or not, "float32").

    Asked for again, it is what was compiled before. A product of precision "highest" is exact. One of "high" is three
    products of bfloat16 on TPUs, and of TF32 on GPUs: it is rounded to TF32.
    """

    @jax.jit
    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = core.jaxpr_as_fun(closed if to == "float32" else _rewrite(closed, BITS[to]))
        return jax.tree.unflatten(jax.tree.structure(shapes), program(*jax.tree.leaves(args)))

    return run


def rounded_products(function: Callable[..., Any], *args: Any) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of the operands of each float32 product that an accelerator would round; loops' bodies count once."""
    equations = _equations(jax.make_jaxpr(function)(*args))
    return [
        tuple(tuple(var.aval.shape) for var in equation.invars)
        for equation in equations
        if any(_rounds(equation, var) for var in equation.invars)
    ]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _rewrite(value: Any, bits: int) -> Any:
    """A jaxpr, open or closed, with a rounding before each product; of anything else itself."""
    if type(value) in (tuple, list):  # of branches
        return type(value)(_rewrite(each, bits) for each in value)
    if not hasattr(value, "eqns"):
        return value
    if isinstance(value, core.ClosedJaxpr) and not isinstance(
        value, core.Jaxpr
    ):  # JAX before 0.11: two classes
        return value.replace(jaxpr=_rewrite(value.jaxpr, bits))
    equations = []
    for equation in value.eqns:
        operands = list(equation.invars)
        for place, var in enumerate(operands):
            if _rounds(equation, var):
                operands[place] = core.Var(var.aval)
                equations.append(
                    core.new_jaxpr_eqn(
                        [var],
                        [operands[place]],
                        primitives.reduce_precision_p,
                        {"exponent_bits": 8, "mantissa_bits": BITS["tf32"] if _is_high(equation) else bits},
                        set(),
                        ctx=equation.ctx,
                    )
                )
        params = {name: _rewrite(param, bits) for name, param in equation.params.items()}
        equations.append(equation.replace(invars=operands, params=params))
    return value.replace(eqns=equations)


def _rounds(equation: Any, var: Any) -> bool:
    """Whether an accelerator rounds this operand."""
    if equation.primitive.name not in PRODUCTS or var.aval.dtype != jnp.float32:
        return False
    highest = jax.lax.Precision.HIGHEST
    return equation.params["precision"] not in (highest, (highest, highest))


def _is_high(equation: Any) -> bool:
    high = jax.lax.Precision.HIGH
    return equation.params["precision"] in (high, (high, high))
