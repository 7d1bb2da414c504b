"""A configuration to read: every key with its value, its type and what it means, section by section."""

from __future__ import annotations

import inspect
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from sora_jax import values
from sora_jax.config import REQUIRED, Setting, settings

_COLUMN = 38  # where types and meanings begin


def list_settings(
    schema: type, config: Mapping[str, Any], before: Mapping[str, Any] | None = None, width: int = 0
) -> str:
    """The configuration's keys, a line or more each.

    Args:
      schema: its dataclass.
      config: its values.
      before: what they were before they were set on the command line: those that differ are marked with a star.
      width: of the text; 0: the terminal's.
    """
    width = width or min(max(shutil.get_terminal_size((110, 24)).columns, 80), 130)
    old = {one.key: one.value for one in settings(schema, before)} if before is not None else {}
    lines: list[str] = []
    group: type | None = None
    for one in settings(schema, config):
        if one.group is not group:
            group = one.group
            section = one.key.rpartition(".")[0]
            title = (inspect.getdoc(group) or "").split("\n")[0]
            lines += ["", f"{section}: {title}" if section else title]
        lines += _lines(one, old.get(one.key, one.value), width)
    return "\n".join(lines[1:])


def _lines(one: Setting, was: Any, width: int) -> list[str]:
    changed = was != one.value
    left = f" {'*' if changed else ' '} {one.key} = {values.write(one.value)}"
    notes = [f"was {values.write(was)}"] if changed else []
    if one.default is not REQUIRED and one.default != one.value:
        notes.append(f"default {values.write(one.default) or 'empty'}")
    right = ": ".join(filter(None, (values.takes(one.kind), one.doc)))
    right += f" [{'; '.join(notes)}]" if notes else ""
    wrapped = textwrap.wrap(right, width - _COLUMN, break_long_words=False)
    if len(left) >= _COLUMN:
        return [left, *(" " * _COLUMN + line for line in wrapped)]
    head, *rest = wrapped
    return [left.ljust(_COLUMN) + head, *(" " * _COLUMN + line for line in rest)]


def as_flags(schema: type, config: Mapping[str, Any]) -> str:
    """The whole configuration as flags of a command, a line each: `--config.seed=0`."""
    return "\n".join(
        shlex.quote(f"--config.{one.key}={values.write(one.value)}") for one in settings(schema, config)
    )
