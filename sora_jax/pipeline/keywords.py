"""Keywords: explicit in signatures, and the right name for an unknown one, from other libraries or mistyped."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from sora_jax.errors import UserError, nearest

Schema = TypeVar("Schema")
AS_OPTIONS = contextvars.ContextVar("AS_OPTIONS", default=False)  # set by the command line
# As other libraries call them, for keywords, options of the command line and keys of a storyboard: the first of ours
# that is known there is meant. Keywords `frames` and `size` are taken under these names too.
ALIASES = {
    "num_inference_steps": ("steps",),
    "num_steps": ("steps",),
    "guidance_scale": ("guidance",),
    "cfg_scale": ("guidance",),
    "cfg": ("guidance",),
    "true_cfg_scale": ("guidance",),
    "guidance_2": ("conditioning_guidance",),
    "guidance_scale_2": ("low_noise_guidance",),
    "given_guidance": ("conditioning_guidance",),
    "negative_prompt": ("negative",),
    "generator": ("seed",),
    "scheduler": ("solver",),
    "sampler": ("solver",),
    "num_videos_per_prompt": ("count",),
    "num_images_per_prompt": ("count",),
    "num_videos": ("count",),
    "num_frames": ("frames", "duration"),
    "frames": ("duration",),
    "length": ("duration",),
    "seconds": ("duration",),
    "time": ("at",),
    "width": ("size",),
    "height": ("size",),
    "frame_rate": ("fps",),
    "aspect_ratio": ("aspect",),
    "image": ("picture",),
    "image_path": ("picture",),
    "picture": ("image",),
    "video": ("clip",),
    "video_path": ("video",),
    "mask_image": ("mask",),
    "denoising_strength": ("strength",),
    "prompt": ("prompts", "text"),
    "caption": ("prompt", "text"),
    "out": ("output",),
    "output_path": ("output",),
    "save_path": ("output",),
    "ckpt": ("model",),
    "checkpoint": ("model",),
    "model_path": ("model",),
}


def explicit_keywords(
    *schemas: type, leave_out: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a function that passes `**keywords` on to dataclasses.

    Its signature has each field of `schemas`, but for those in `leave_out`, with type and default, in place of the
    `**keywords`. An unknown keyword is a `UserError` that names the nearest one, or ours for a name of another
    library; `num_frames` and `width` with `height` are taken as `frames` and `size`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own} | set(leave_out)
        fields = {
            field.name: _parameter(schema, field)
            for schema in schemas
            for field in dataclasses.fields(schema)
            if field.name not in names
        }
        positional = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        named = [p for p in own if p.kind is p.KEYWORD_ONLY]
        known = [p.name for p in own if p.name != "self"] + list(fields)

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            keywords = known_keywords(function.__name__, keywords, known)
            check_conflicts(keywords)
            return function(*arguments, **keywords)

        checked.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*positional, *named, *fields.values()]
        )
        return checked

    return decorate


def accepts_aliases(schema: type[Schema]) -> type[Schema]:
    """A decorator for a dataclass: its constructor takes keywords as functions of `explicit_keywords` do."""
    make, known = schema.__init__, [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]

    @functools.wraps(make)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **known_keywords(schema.__name__, keywords, known))

    schema.__init__ = checked  # type: ignore[method-assign]
    return schema


def option_name(name: str) -> str:
    """A keyword as its user knows it: `--name` while a command of ours runs."""
    return f"--{name.replace('_', '-')}" if AS_OPTIONS.get() else name


def check_conflicts(given: Mapping[str, Any]) -> None:
    """Raises UserError where two of a shape's values that aren't None say the same."""
    named = {name for name, value in given.items() if value is not None}
    if {"duration", "frames"} <= named:
        raise UserError("duration and frames both set the video's length: give one of the two.")
    if "size" in named and named & {"resolution", "aspect"}:
        raise UserError(
            f"{option_name('size')} sets the whole frame size: leave out {option_name('resolution')} and "
            f"{option_name('aspect')}."
        )


def known_keywords(function: str, keywords: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """`keywords` under the names that `function` has for them.

    Raises:
      UserError: one is not known, with the nearest of `known`; or one of width and height is missing.
    """
    known, out = list(known), dict(keywords)
    if "num_frames" in out and "frames" in known:
        _rename(function, out, "num_frames", "frames", out.pop("num_frames"))
    if "size" in known and ("width" in out or "height" in out):
        if not ("width" in out and "height" in out):
            raise UserError(
                f"{function} was given one of width and height: give both, or resolution and aspect."
            )
        _rename(function, out, "width and height", "size", (out.pop("height"), out.pop("width")))
    for name in out:
        if name not in known:
            hint = suggestion(name, known) or f"it takes {', '.join(known)}."
            raise UserError(f"{function} has no keyword {name!r}: {hint}")
    return out


def _rename(function: str, keywords: dict[str, Any], theirs: str, ours: str, value: Any) -> None:
    if ours in keywords:
        raise UserError(
            f"{function} was given {theirs} and {ours}, which mean the same: give one of the two."
        )
    keywords[ours] = value


def suggestion(name: str, known: Collection[str], spelling: Mapping[str, str] | None = None) -> str:
    """What an unknown name is called here, or the nearest of `known`, as the end of a sentence; empty without one.

    Args:
      name: as it was given.
      known: the names there are.
      spelling: how they are written, where not as they are.
    """
    written = lambda ours: (spelling or {}).get(ours, ours)
    for ours in (name, *ALIASES.get(name, ())):
        if ours in known:
            return f"it is called {written(ours)} here."
    near = nearest(name, known)
    return f"did you mean {written(near)}?" if near else ""


def _parameter(schema: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_types(schema)[field.name]
    )


@functools.cache
def _types(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)
