"""Checks of values: an error names the setting, the value and what to give, in one sentence."""

from __future__ import annotations

from typing import Any

from sora_jax.errors import UserError
from sora_jax.values import holds

MAX_SEED = 2**31 - 1


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raises UserError where `value` is not a whole number from `minimum` to `maximum`."""
    if not holds(int, value) or value < minimum or (maximum is not None and value > maximum):
        span = f"from {minimum} on" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"{name}={short_repr(value)} can't be used: give a whole number {span}.")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> None:
    """Raises UserError where `value` is not a finite number within these bounds."""
    number = is_number(value)
    low = number and ((above is not None and value <= above) or (minimum is not None and value < minimum))
    if not number or low or (maximum is not None and value > maximum):
        parts = [f"above {above:g}"] if above is not None else []
        onwards = " on" if maximum is None else ""
        parts += [f"from {minimum:g}{onwards}"] if minimum is not None else []
        bounded = above is not None or minimum is not None
        parts += [f"{'to' if bounded else 'up to'} {maximum:g}"] if maximum is not None else []
        span = f" {' '.join(parts)}" if parts else ""
        raise UserError(f"{name}={short_repr(value)} can't be used: give a number{span}.")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number and no truth value."""
    return holds(float, value)


def check_text(name: str, value: Any) -> None:
    """Raises UserError where `value` is not text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{name}={short_repr(value)} can't be used: give a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not valid text, from letter {error.start + 1} on: give it in UTF-8."
        ) from error


def check_bool(name: str, value: Any) -> None:
    """Raises UserError where `value` is neither True nor False."""
    if not holds(bool, value):
        raise UserError(f"{name}={short_repr(value)} can't be used: give True or False.")


def short_repr(value: Any, maximum: int = 40) -> str:
    """`repr` of a value, shortened to `maximum` letters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= maximum else text[: maximum - 1] + "…"
