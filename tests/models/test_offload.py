"""Transformers whose blocks come to the device one by one: the same numbers, and two blocks there at most."""

import dataclasses
import threading
import weakref

import jax
import numpy as np
import pytest
from helpers.diffusers_folder import golden
from helpers.parity import draw_all, relative_error
from ltx_check import segment as ltx_segment
from ltx_check import sigmas
from wan_check import segment as wan_segment

from sora_jax.models import offload
from sora_jax.models.ltx_weights import PUBLISHED_LTX, ltx_config
from sora_jax.models.wan_weights import PUBLISHED_WAN, published_shapes, wan_config
from sora_jax.tokens.packing import pack_batch

WAN, LTX = golden("wan_tiny"), golden("ltx_tiny")


def wan_batch():
    one = wan_segment(WAN["latent"][0].transpose(1, 2, 3, 0), WAN["text"][0], given=1)
    batch, _ = pack_batch([[one]], 1, 32, 16, 4)
    return batch, sigmas(batch)


def ltx_batch():
    batch, _ = pack_batch([[ltx_segment(LTX["latent"], LTX["text"], 1, 24.0)]], 1, 48, 16, 4)
    return batch, sigmas(batch)


@pytest.mark.parametrize(
    ("published", "config", "kept", "batch", "dtype"),
    [
        (PUBLISHED_WAN, wan_config(WAN["config"]), WAN, wan_batch(), np.float32),
        (PUBLISHED_WAN, wan_config(WAN["config"]), WAN, wan_batch(), np.int8),
        (PUBLISHED_LTX, ltx_config(LTX["config"]), LTX, ltx_batch(), np.float32),
    ],
)
def test_it_gives_what_the_whole_model_gives(published, config, kept, batch, dtype):
    weights = draw_all(kept["names"])
    whole = published.load(config, weights, dtype=dtype)
    expected = jax.jit(lambda model, batch, sigma: model(batch.patches, batch, sigma))(whole, *batch)
    for keep in (True, False):
        model = published.offload(config, weights, dtype=dtype, keep=keep)
        assert relative_error(model(batch[0].patches, *batch), np.asarray(expected)) < 1e-5
    numbers = lambda tree: sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(tree))
    assert numbers(model) == numbers(published.load(config, weights))


@pytest.fixture
def deep():
    """Eight layers, read from their tensors each time."""
    config = dataclasses.replace(wan_config(WAN["config"]), layers=8)
    return PUBLISHED_WAN.offload(config, draw_all(list(published_shapes(config))), keep=False)


def test_two_blocks_at_most_are_on_the_device(deep, monkeypatch):
    """The one after next is read when the block before is done, and nothing holds that any more."""
    done, alive, seen, read, compute = [], [], [], deep.read, offload._layer

    class Result:
        def __init__(self, x):
            self.x = x

        def block_until_ready(self):
            done.append(self.x.block_until_ready())

    def watched(i):
        seen.append((i, len(done), sum(one() is not None for one in alive)))
        block = read(i)
        alive.append(weakref.ref(block))
        return block

    deep.read = watched
    embed, project = offload._embed, offload._project
    wrapped = lambda *given: (Result((out := embed(*given))[0]), *out[1:])
    monkeypatch.setattr(offload, "_embed", wrapped)
    monkeypatch.setattr(offload, "_layer", lambda block, x, *rest: Result(compute(block, x.x, *rest)))
    monkeypatch.setattr(offload, "_project", lambda outer, x, *rest: project(outer, x.x, *rest))
    batch, sigma = wan_batch()
    deep(batch.patches, batch, sigma)
    assert [i for i, *_ in seen] == list(range(8))
    assert all(waited >= i for i, waited, _ in seen) and max(held for *_, held in seen) == 1


def test_the_next_block_is_read_while_one_computes(deep, monkeypatch):
    begun, read, compute = [threading.Event() for _ in range(9)], deep.read, offload._layer
    begun[8].set()
    computed = []

    def watched(i):
        begun[i].set()
        return read(i)

    def layer(*given):
        assert begun[len(computed) + 1].wait(30)
        computed.append(1)
        return compute(*given)

    deep.read = watched
    monkeypatch.setattr(offload, "_layer", layer)
    batch, sigma = wan_batch()
    deep(batch.patches, batch, sigma)
    assert len(computed) == 8


def test_what_can_not_be_read_is_said(deep):
    def broken(i):
        raise OSError("the disk is gone")

    deep.read = broken
    batch, sigma = wan_batch()
    with pytest.raises(OSError, match="disk is gone"):
        deep(batch.patches, batch, sigma)
