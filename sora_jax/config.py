"""Configurations are plain values; each component has one dataclass that says what it takes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sora_jax.errors import UserError


def component(schema: type, values: Mapping[str, Any], name: str) -> Any:
    """A component's dataclass from its part of the configuration, `config.<name>`.

    Raises:
      UserError: a key that the component doesn't have, with the nearest that it has; or one that is missing.
    """
    # A component holds plain values, hashable or not, and knows nothing of where they came from.
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    fields = [field.name for field in dataclasses.fields(schema)]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0)
            raise UserError(
                f"config.{name}.{key} is no key of {schema.__name__}: did you mean config.{name}.{near[0]}?"
            )
    try:
        return schema(**{key: _fixed(value) for key, value in values.items()})
    except TypeError as error:
        raise UserError(f"config.{name} is incomplete: {error}.") from error


def _fixed(value: Any) -> Any:
    """Lists (of JSON) as tuples: a configuration is a static part of a model, so `jax.jit` hashes it."""
    return tuple(map(_fixed, value)) if isinstance(value, (list, tuple)) else value
