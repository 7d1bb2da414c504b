"""Values of a configuration as people write them: read from text, checked against a type, written back.

Types are those of dataclass fields: bool, int, float, str, None, Literal, unions, tuples (nested, of fixed length or
any) and mappings from names. What doesn't fit raises ValueError with a reason; `sora_jax.config` adds the key.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any

_YES, _NO, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")
_OPEN, _CLOSE = "([", ")]"


def takes(kind: Any) -> str:
    """What a type takes, in words: "3 whole numbers separated by commas"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_union(kind):
        return " or ".join(takes(one) for one in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        if inner[-1:] != (...,) and len(set(inner)) > 1:
            return "(" + "; ".join(map(takes, inner)) + ")"
        count = "" if inner[-1:] == (...,) else f"{len(inner)} "
        return f"{count}{_plural(inner[0])} separated by commas"
    if is_mapping(kind):
        return "a table of names and values, in JSON"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return "a group of keys"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, "none" if kind in (None, types.NoneType) else "any value")


def _plural(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        count = "" if inner[-1:] == (...,) else f"{len(inner)} "
        return f"groups of {count}{_plural(inner[0])}"
    words = {int: "whole numbers", float: "numbers", str: "texts", bool: "times true or false"}
    return words.get(kind, "values")


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) in (dict, collections.abc.Mapping)


def read(kind: Any, text: str) -> Any:
    """The value that `text` writes: `1,2,2`, `(64,0.25),(8,0.125)`, `false`, `none`, `{"first": 0.5}`.

    Raises:
      ValueError: it writes none of this type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    bare = text.strip()
    if is_union(kind):
        return _first(read, inner, text)
    if origin is typing.Literal:
        for choice in inner:
            if bare == str(choice):
                return choice
        raise ValueError("it is none of them")
    if origin is tuple:
        items = _items(bare, nested=bool(inner) and typing.get_origin(inner[0]) is tuple)
        return tuple(
            read(one, _unquoted(item) if one is str else item)
            for one, item in zip(_kinds(inner, len(items)), items, strict=True)
        )
    if kind in (None, types.NoneType):
        if bare.lower() in _NONE:
            return None
        raise ValueError("it isn't none")
    if kind is bool:
        if bare.lower() in (*_YES, *_NO):
            return bare.lower() in _YES
        raise ValueError("it is neither")
    if kind in (int, float):
        return _number(kind, bare)
    if kind is str:
        return text
    return check(kind, _literal(bare, strict=is_mapping(kind)))


def check(kind: Any, value: Any) -> Any:
    """`value` as this type holds it: lists (of JSON) as tuples, whole numbers as floats where those are wanted.

    Raises:
      ValueError: it is of another type or length.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_union(kind):
        return _first(check, inner, value)
    if origin is typing.Literal:
        if value in inner and type(value) in map(type, inner):
            return value
        raise ValueError("it is none of them")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError("it is no list")
        return tuple(check(one, item) for one, item in zip(_kinds(inner, len(value)), value, strict=True))
    if is_mapping(kind):
        if not isinstance(value, collections.abc.Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError("it is no table")
        return {name: check(inner[1], item) for name, item in value.items()}
    if kind is bool or isinstance(value, bool):
        if kind in (bool, Any) and isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, numbers.Integral):
            return int(value)
    elif kind is float:
        if isinstance(value, numbers.Real) and _is_finite(value):
            return float(value)
    elif kind is Any or kind is types.NoneType or isinstance(kind, type):
        if kind is Any:
            return fixed(value)
        if isinstance(value, kind):
            return value
    raise ValueError(f"it is {type(value).__name__}")


def holds(kind: Any, value: Any) -> bool:
    """Whether `value` is of this type, as `check` takes it."""
    try:
        check(kind, value)
    except ValueError:
        return False
    return True


def write(value: Any) -> str:
    """The text from which `read` makes the value."""
    if isinstance(value, tuple | list):
        return ",".join(map(_write_item, value)) or "()"
    if isinstance(value, collections.abc.Mapping):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _write_item(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"({write(item)})" if item else "()"
    if isinstance(item, str) and (not item or item != item.strip() or set(item) & set("()[],'\"")):
        return json.dumps(item, ensure_ascii=False)
    return write(item)


def kind_of(value: Any) -> Any:
    """A type for a value of which no dataclass says one."""
    if isinstance(value, tuple | list):
        kinds = {kind_of(item) for item in value}
        if kinds == {int, float}:
            kinds = {float}
        return tuple[kinds.pop(), ...] if len(kinds) == 1 else tuple[Any, ...]  # type: ignore[misc]
    if isinstance(value, collections.abc.Mapping):
        return collections.abc.Mapping[str, Any]
    return type(value) if isinstance(value, bool | int | float | str) else Any


def fixed(value: Any) -> Any:
    """Lists (of JSON) as tuples: a configuration is a static part of a model, so `jax.jit` hashes it."""
    return tuple(map(fixed, value)) if isinstance(value, list | tuple) else value


def _first(convert: Callable[[Any, Any], Any], kinds: tuple[Any, ...], value: Any) -> Any:
    """What the first of `kinds` that takes the value makes of it; None comes before text, which takes every word."""
    for kind in sorted(kinds, key=lambda kind: kind is not types.NoneType):
        with contextlib.suppress(ValueError):
            return convert(kind, value)
    raise ValueError("none of its types takes it")


def _is_finite(number: numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int larger than any float
        return False


def _kinds(inner: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The type of each of a tuple's items."""
    return inner[:1] * count if inner[-1:] == (...,) else inner


def _number(kind: type, text: str) -> Any:
    try:
        return int(text) if kind is int else check(float, float(text))
    except ValueError:
        if kind is int and "e" in text.lower() and math.isfinite(float(text)) and float(text).is_integer():
            return int(float(text))  # 1e5
        raise


def _literal(text: str, strict: bool) -> Any:
    """What JSON or Python reads; where neither does and it needn't be (`strict`), the text itself."""
    for reads in (json.loads, ast.literal_eval):
        try:
            return reads(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    if strict:
        raise ValueError("it is no JSON")
    return text


def _items(text: str, nested: bool) -> list[str]:
    """The parts between commas that stand in no brackets or quotes; brackets around the whole are taken off."""
    items = _split(text)
    if len(items) == 1 and items[0][:1] in tuple(_OPEN) and items[0][-1:] in tuple(_CLOSE):
        # Of groups, one pair of brackets is the group's own: ((2,2,2),(1,2,2)) and (2,2,2) are both lists of groups.
        within = items[0][1:-1].strip()
        if not nested or within[:1] in ("", *_OPEN):
            items = _split(within)
    return items


def _split(text: str) -> list[str]:
    if not text:
        return []
    items, start, depth, quote, escaped = [], 0, 0, "", False
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and not escaped else quote
            escaped = sign == "\\" and not escaped
        elif sign in "\"'":
            quote = sign
        elif sign in _OPEN:
            depth += 1
        elif sign in _CLOSE:
            depth -= 1
            if depth < 0:
                break
        elif sign == "," and depth == 0:
            items.append(text[start:place].strip())
            start = place + 1
    if depth or quote:
        raise ValueError("a bracket or a quote is not closed")
    last = text[start:].strip()
    items += [last] if last else []  # (5,) is one
    if "" in items or not items:
        raise ValueError("a value between two commas is missing")
    return items


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return str(_literal(text, strict=True))
    return text
