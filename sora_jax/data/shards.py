"""How a run's data are dealt out: a fixed number of shards, whatever the number of hosts.

A shard is a stream of its own with an equal part of each batch's rows. A host reads the shards whose rows lie on its
devices, so the global batch is the same on any number of hosts, and a run saved by two goes on with one or four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain

from sora_jax.distributed.mesh import Share
from sora_jax.errors import UserError


def own_shards(share: Share, shards: int, rows: int, section: str = "config.pipeline") -> tuple[int, ...]:
    """The shards that this host reads.

    Args:
      share: which of the rows are this host's.
      shards, rows: how many there are in all, and in the global batch.
      section: of the configuration, for the errors.

    Raises:
      UserError: the rows can't be split over the shards, or the shards over the hosts.
    """
    if shards < 1 or rows % shards:
        raise UserError(
            f"{section}.batch_size={rows} can't be split evenly over {section}.shards={shards} shards of data: "
            "make it a multiple of the shards."
        )
    return share.deal(shards, f"{section}.shards")


class Sharded(grain.IterDataset):
    """Streams lists of elements, `each` from every shard, in the shards' order.

    An iterator's state is a table from shard to state, {"shards": {"0": …}}; `set_state` takes its own shards from a
    table that may hold more.

    Args:
      streams: by its number, each shard that is read here.
      each: elements that a shard gives at a time.
      empty: stands for the elements that a finite shard lacks when others go on.

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
        return {
            "shards": {
                str(number): parent.get_state()
                for number, parent in zip(self._config.numbers, self._parents, strict=True)
            }
        }

    def set_state(self, state: dict[str, Any]) -> None:
        # Before there were shards, a state was that of the only one.
        table = state.get("shards", {"0": state})
        missing = [number for number in self._config.numbers if str(number) not in table]
        if missing:
            raise UserError(
                f"This checkpoint holds the data of {len(table)} shards, and none of shard {missing[0]}: a run keeps "
                "the number of shards that it began with."
            )
        for number, parent in zip(self._config.numbers, self._parents, strict=True):
            parent.set_state(table[str(number)])
