"""Checks of values: an error names the setting, the value and what to give, in one sentence."""

from __future__ import annotations

from typing import Any

from sora_jax.errors import UserError
from sora_jax.values import holds

MAX_SEED = 2**31 - 1


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises UserError where `value` is not a whole number from `least` to `most`."""
    if not holds(int, value) or value < least or (most is not None and value > most):
        span = f"from {least} on" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}={shown(value)} can't be used: give a whole number {span}.")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Raises UserError where `value` is not a finite number within these bounds."""
    number = is_number(value)
    low = number and ((above is not None and value <= above) or (least is not None and value < least))
    if not number or low or (most is not None and value > most):
        parts = [f"above {above:g}"] if above is not None else []
        parts += [f"from {least:g} on" if most is None else f"from {least:g}"] if least is not None else []
        bounded = above is not None or least is not None
        parts += [f"{'to' if bounded else 'up to'} {most:g}"] if most is not None else []
        span = f" {' '.join(parts)}" if parts else ""
        raise UserError(f"{name}={shown(value)} can't be used: give a number{span}.")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number and no truth value."""
    return holds(float, value)


def check_text(name: str, value: Any) -> None:
    """Raises UserError where `value` is not text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{name}={shown(value)} can't be used: give a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not valid text, from letter {error.start + 1} on: give it in UTF-8."
        ) from error


def check_switch(name: str, value: Any) -> None:
    """Raises UserError where `value` is neither True nor False."""
    if not holds(bool, value):
        raise UserError(f"{name}={shown(value)} can't be used: give True or False.")


def shown(value: Any, most: int = 40) -> str:
    """`repr` of a value, shortened to `most` letters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= most else text[: most - 1] + "…"
