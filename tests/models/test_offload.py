"""Transformers whose blocks come to the device one by one: the same numbers, two blocks at most, prompts of both kinds."""

import threading

import jax
import numpy as np
import pytest
from helpers.diffusers_folder import golden
from helpers.parity import draw_all
from ltx_check import run as run_ltx
from wan_check import run, segment, sigmas

from sora_jax.models import offload
from sora_jax.models.ltx_weights import load_ltx, ltx_config, offload_ltx
from sora_jax.models.wan_weights import load_wan, offload_wan, wan_config
from sora_jax.tokens.packing import pack_batch
