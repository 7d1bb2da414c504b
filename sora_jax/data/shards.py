"""The data of a run in a fixed number of shards, independent of the number of hosts.

A shard is a stream with an equal part of each batch. A host reads the shards whose part is on its devices, so the
global batch is the same on any number of hosts, and a run saved by two resumes on one or four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain

from sora_jax.distributed.mesh import Share
from sora_jax.errors import UserError


def own_shards(
    share: Share, shards: int, batch_size: int, section: str = "config.pipeline"
) -> tuple[int, ...]:
    """The shards that this host reads.

    Args:
      share: the part of the batch that is this host's.
      shards, batch_size: how many shards there are, and of the global batch.
      section: of the configuration, for the errors.

    Raises:
      UserError: the batch can't be split over the shards, or the shards over the hosts.
    """
    if shards < 1 or batch_size % shards:
        raise UserError(
            f"{section}.batch_size={batch_size} can't be split evenly over {section}.shards={shards} shards of data: "
            "make it a multiple of the shards."
        )
    return share.assign(shards, f"{section}.shards")


class Sharded(grain.IterDataset):
    """Streams lists of elements, `each` from every shard, in the shards' order.

    An iterator's state is a table from shard to state, {"shards": {"0": …}}; `set_state` takes its own shards from a
    table that may hold more.

    Args:
      streams: the shards that are read here, by number.
      each: elements taken from a shard at a time.
      empty: replaces the missing elements of a finite shard that ends before others.

    Raises:
      UserError: (from an iterator's `set_state`) a shard's state is missing.
    """

    def __init__(self, streams: Mapping[int, grain.IterDataset], each: int, empty: Any = None) -> None:
        super().__init__(list(streams.values()))
        self.numbers, self.each, self.empty = tuple(streams), each, empty

    def __iter__(self) -> grain.DatasetIterator:
        return _Reading([iter(parent) for parent in self._parents], self)


class _Reading(grain.DatasetIterator):
    def __init__(self, parents: list[grain.DatasetIterator], config: Sharded) -> None:
        super().__init__(parents)
        self._config = config

    def __next__(self) -> list[Any]:
        taken = [self._take(parent) for parent in self._parents]
        if not any(taken):
            raise StopIteration
        each, empty = self._config.each, self._config.empty
        return [element for elements in taken for element in [*elements, *[empty] * (each - len(elements))]]

    def _take(self, parent: grain.DatasetIterator) -> list[Any]:
        return [element for _, element in zip(range(self._config.each), parent)]

    def get_state(self) -> dict[str, Any]:
        parents = zip(self._config.numbers, self._parents, strict=True)
        return {"shards": {str(number): parent.get_state() for number, parent in parents}}

    def set_state(self, state: dict[str, Any]) -> None:
        table = state["shards"]
        missing = [number for number in self._config.numbers if str(number) not in table]
        if missing:
            raise UserError(
                f"This checkpoint holds the data of {len(table)} shards, and none of shard {missing[0]}: a run keeps "
                "the number of shards that it started with."
            )
        for number, parent in zip(self._config.numbers, self._parents, strict=True):
            parent.set_state(table[str(number)])
