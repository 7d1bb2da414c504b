"""What differs between the kinds of diffusers' pipelines, as `pretrained` asks for it: one object a kind."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sora_jax.checkpoints.components import Autoencoder, Sampling
from sora_jax.checkpoints.diffusers_folder import Family, Reference
from sora_jax.models.published import Published
from sora_jax.models.text import TextConfig


@dataclasses.dataclass(frozen=True)
class PipelineKind:
    """A kind of pipelines, by functions that know its files.

    Attributes:
      models: what they are, in a few words.
      transformer: the network and its files.
      read_config: its configuration, of the contents of a config.json and fields of ours.
      autoencoder, read_vae_config, load_vae: likewise, of (contents of config.json, dtype) and of (contents, tensors).
      vae_shapes: diffusers' name and shape of each of its tensors, of its configuration.
      publish_vae: those tensors, of (its configuration, our parameters by name).
      family: the name of a model and what its files don't say, of a configuration and the contents of model_index.json.
      sampling: how a model is sampled, of (folder, family, contents of model_index.json, reference).
      text: how captions are encoded, but for the folder's name.
      adapt: the transformer's configuration with what depends on the rest of the pipeline, of (its own,
        autoencoder's, sampling, reference).
      adapt_vae: the autoencoder's, of (its own, reference).
    """

    models: str
    transformer: Published
    read_config: Callable[..., Any]
    autoencoder: Callable[..., Autoencoder]
    read_vae_config: Callable[[Mapping[str, Any], str], Any]
    load_vae: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Autoencoder]
    vae_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    publish_vae: Callable[[Any, Mapping[str, Any]], dict[str, np.ndarray]]
    family: Callable[[Any, Mapping[str, Any]], tuple[str, Family]]
    sampling: Callable[[pathlib.Path, Family, Mapping[str, Any], Reference], Sampling]
    text: Callable[[Reference], TextConfig]
    adapt: Callable[[Any, Any, Sampling, Reference], Any]
    adapt_vae: Callable[[Any, Reference], Any] = lambda config, reference: config
