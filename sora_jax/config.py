"""Configurations are plain values; each component has one dataclass that says what it takes.

A dataclass of dataclasses is the schema of a whole configuration: every field has its type, its default and its line
of the docstring's `Attributes`, and each can be set on the command line (`override`) and shown (`settings`). The
metadata of a field may say more:

- `keys`: of a mapping, which names it takes: a tuple of them, or a dataclass of which it sets fields;
- `defaults`: of a section, defaults that differ from its dataclass's; `ABSENT`: the field isn't filled in.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from sora_jax import values
from sora_jax.errors import UserError, nearest

# Keys that had another name before 2026-11-29. Stored configurations are read with them, what people write is refused.
RENAMED = {
    "dit.hints": "dit.reference_frames",
    "limits.row_text": "limits.text_len",
    "loss.rows": "loss.batch_size",
    "pipeline.max_runs": "pipeline.max_segments",
    "pipeline.row_text": "pipeline.text_len",
    "pipeline.row_tokens": "pipeline.seq_len",
    "pipeline.rows": "pipeline.batch_size",
    "pipeline.time_window": "pipeline.temporal_crop_prob",
    "pipeline.window": "pipeline.num_packing_bins",
}
REQUIRED = dataclasses.MISSING
ABSENT: Any = object()


def component(schema: type, given: Mapping[str, Any], name: str) -> Any:
    """A component's dataclass from its part of the configuration, `config.<name>`.

    Raises:
      UserError: a key that the component doesn't have, with the nearest that it has; one that is missing; or a value
        of another type than the field's.
    """
    # A component holds plain values, hashable or not, and knows nothing of where they came from.
    given = _plain(given)
    kinds = types_of(schema)
    for key in given:
        if key not in kinds:
            check_renamed(f"{name}.{key}")
            near = nearest(key, kinds, 0)
            raise UserError(
                f"config.{name}.{key} is no key of {schema.__name__}: did you mean config.{name}.{near}?"
            )
    prefix = f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    checked = {key: _checked(schema, fields[key], value, prefix + key) for key, value in given.items()}
    for key, field in fields.items():
        if key not in checked and _default(field) is REQUIRED:
            raise UserError(f"config.{prefix}{key} is missing: it takes {values.takes(kinds[key])}.")
    return schema(**checked)


def check_renamed(key: str) -> None:
    """Raises UserError with the new name where `key`, such as "pipeline.rows", is an old one."""
    if key in RENAMED:
        raise UserError(f"config.{key} is called config.{RENAMED[key]} now: use that name.")


def with_new_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as an earlier version stored it, with today's names of keys (`RENAMED`)."""
    new = {name: dict(value) if isinstance(value, Mapping) else value for name, value in stored.items()}
    for old, key in RENAMED.items():
        section, name = old.split(".")
        if isinstance(new.get(section), dict) and name in new[section]:
            new[section][key.split(".")[1]] = new[section].pop(name)
    return new


def check_ranges(config: Any, name: str, **ranges: tuple[float, float]) -> None:
    """Raises UserError where a number of the component `config.<name>`, or of a tuple there, is out of its range."""
    prefix = f"config.{name}." if name else "config."
    for field, (least, most) in ranges.items():
        value = getattr(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:
                bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise UserError(f"{prefix}{field}={values.write(value)} must be {bounds}.")


# Ranges that many fields have.
COUNT, FROM_ZERO, SHARE, SEED = (1, math.inf), (0, math.inf), (0, 1), (0, 2**32 - 1)


@functools.cache
def types_of(schema: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


@functools.cache
def docs_of(schema: type) -> dict[str, str]:
    """What the docstring's `Attributes` say of each field, as one line."""
    documented: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        for names, line in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", text, re.MULTILINE):
            documented |= dict.fromkeys(names.split(", "), " ".join(line.split()))
    return documented


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value of a configuration.

    Attributes:
      key: without `config.`, such as "optim.lr".
      kind: its type.
      value, default: as it is, and as its dataclass has it; `REQUIRED` where there is none.
      doc: what it means, in a line.
      group: the section's dataclass, or the whole's.
      names: of a mapping, those that it takes; None: any.
      is_section: it stands for a section, not for a value.
    """

    key: str
    kind: Any
    value: Any
    default: Any
    doc: str
    group: type
    names: tuple[str, ...] | None = None
    is_section: bool = False


def complete(schema: type, given: Mapping[str, Any]) -> ConfigDict:
    """The configuration with every field that `schema` has: `given` values, and defaults for what isn't given.

    Keys that the schema doesn't have stay as they are: an objective of one's own reads them, and a component refuses
    them by name.

    Raises:
      UserError: a value is of another type than its field.
    """
    return ConfigDict(_complete(schema, _plain(given), ""))


def override(schema: type, given: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """`given` with values set that are written as text, by key: {"optim.lr": "3e-4"}.

    Raises:
      UserError: there is no such key (the nearest is named), or the text writes no value of its type.
    """
    changed = _plain(given)
    for key, text in changes.items():
        value = _read(schema, changed, key, text)
        *groups, last = key.split(".")
        place = changed
        for group in groups:
            place[group] = place.get(group) or {}
            place = place[group]
        place[last] = value
    return changed


def _read(schema: type, given: Mapping[str, Any], key: str, text: str) -> Any:
    known = {one.key: one for one in _walk(schema, given, "", {})}
    one, (parent, _, name) = known.get(key), key.rpartition(".")
    kind, default = (one.kind, one.default) if one else (None, REQUIRED)
    if one is None and parent in known and values.is_mapping(known[parent].kind):
        names = known[parent].names
        if names is None or name in names:
            one, kind = known[parent], typing.get_args(known[parent].kind)[1]
    if one is None:
        check_renamed(key)
        entries = [f"{other.key}.{name}" for other in known.values() for name in other.names or ()]
        near = nearest(key, [*known, *entries], 0)
        raise UserError(f"config.{key} is no key of this configuration: did you mean config.{near}?")
    if dataclasses.is_dataclass(kind):
        within = next(iter(types_of(kind)))  # type: ignore[arg-type]
        raise UserError(f"config.{key} is a group of keys: set one of them, such as config.{key}.{within}.")
    try:
        # A section that may be absent is taken away whole, and set key by key.
        return values.read(None if one.is_section and values.is_union(kind) else kind, text)
    except ValueError:
        raise _wrong(key, kind, default, text) from None


def settings(schema: type, given: Mapping[str, Any]) -> list[Setting]:
    """Every value of a configuration, section by section; what the schema doesn't have comes last in its section."""
    full = complete(schema, given).to_dict()
    return [one for one in _walk(schema, full, "", {}) if one.value is not ABSENT]


def _walk(schema: type, given: Mapping[str, Any], prefix: str, own: Mapping[str, Any]) -> Iterator[Setting]:
    """Settings of all that may be set, of sections too; those that aren't values of `given` are `ABSENT`."""
    kinds, docs, sections = types_of(schema), docs_of(schema), []
    for field in dataclasses.fields(schema):
        name, inner = field.name, _section(schema, field)
        value, default = given.get(name, ABSENT), own.get(name, _default(field))
        default = _default(field) if default is ABSENT else default
        names = None if inner else field.metadata.get("keys")
        if inner:
            within = value if isinstance(value, Mapping) else {}
            sections.append((inner, within, f"{prefix}{name}.", field.metadata.get("defaults", {})))
            value = None if value is None else ABSENT
        yield Setting(
            prefix + name, kinds[name], value, default, docs.get(name, ""), schema, names, inner is not None
        )
    for name, value in given.items():
        if name not in kinds:
            yield from _walk_free(prefix + name, value, schema)
    for section in sections:
        yield from _walk(*section)


def _walk_free(key: str, value: Any, group: type) -> Iterator[Setting]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk_free(f"{key}.{name}", inner, group)
    else:
        yield Setting(key, values.kind_of(value), value, REQUIRED, "", group)


def _complete(schema: type, given: Mapping[str, Any], prefix: str, **own: Any) -> dict[str, Any]:
    full: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        name, inner = field.name, _section(schema, field)
        default = own.get(name, _default(field))
        value = given.get(name, default)
        if inner and (name in given or default is not None) and isinstance(value, Mapping | inner):
            within = given.get(name, {})
            full[name] = _complete(inner, within, f"{prefix}{name}.", **field.metadata.get("defaults", {}))
        elif value is not REQUIRED and value is not ABSENT:
            full[name] = _checked(schema, field, value, prefix + name)
    return full | {name: value for name, value in given.items() if name not in full}


def sections_of(schema: type) -> dict[str, type]:
    """The dataclasses of the fields that are sections."""
    found = {field.name: _section(schema, field) for field in dataclasses.fields(schema)}
    return {name: section for name, section in found.items() if section}


def _section(schema: type, field: dataclasses.Field[Any]) -> type | None:
    """The dataclass of a field that is a section, or whose mapping sets fields of one."""
    kind = types_of(schema)[field.name]
    for one in (*typing.get_args(kind), kind, field.metadata.get("keys")):
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            return one
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _checked(schema: type, field: dataclasses.Field[Any], value: Any, key: str) -> Any:
    kind = types_of(schema)[field.name]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
        return value
    try:
        checked = values.check(kind, value)
    except ValueError:
        raise _wrong(key, kind, _default(field), repr(value)) from None
    names = field.metadata.get("keys")
    if isinstance(names, tuple):
        for other in set(checked) - set(names):
            near = nearest(other, names, 0)
            raise UserError(f"config.{key}.{other} is no key: did you mean config.{key}.{near}?")
    return checked


def _wrong(key: str, kind: Any, default: Any, got: str) -> UserError:
    plain = default is not REQUIRED and default not in (None, "", ()) and not isinstance(default, Mapping)
    example = f", such as {values.write(default)}" if plain else ""
    return UserError(f"config.{key} takes {values.takes(kind)}{example}, and got {got or 'nothing'}.")


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    given = given.to_dict() if isinstance(given, ConfigDict) else given
    return {
        name: _plain(value) if isinstance(value, Mapping | ConfigDict) else values.fixed(value)
        for name, value in given.items()
    }
