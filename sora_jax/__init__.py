"""sora_jax: open video generation in JAX.

>>> import sora_jax
>>> video = sora_jax.load("toyworld").generate("a red circle moves left", duration=2.0)
>>> video.save("out.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sora_jax import backend
from sora_jax.backend import __version__

if TYPE_CHECKING:
    from sora_jax.media.video import Video, read_video
    from sora_jax.pipeline.pipeline import Pipeline, Request, list_models, load

backend.prepare()  # before JAX starts, and without importing it

__all__ = ["Pipeline", "Request", "Video", "__version__", "list_models", "load", "read_video"]

_EXPORTS = dict.fromkeys(("Request", "Pipeline", "list_models", "load"), "pipeline.pipeline") | dict.fromkeys(
    ("Video", "read_video"), "media.video"
)


def __getattr__(name: str) -> Any:
    # Loaded when first used: importing a part of the package doesn't import JAX and the rest.
    if name not in _EXPORTS:
        hint = "; list_models() tells what can be loaded" if name == "models" else ""
        raise AttributeError(f"module 'sora_jax' has no attribute {name!r}{hint}")
    import importlib

    backend.check_version()
    return getattr(importlib.import_module(f"sora_jax.{_EXPORTS[name]}"), name)
