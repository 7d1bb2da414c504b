"""What the training loop needs of an objective; `train.dit`, `train.vae` and the tests' line have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import grain
import jax
import PIL.Image
from ml_collections import ConfigDict

from sora_jax.distributed.mesh import Share
from sora_jax.train.loop_config import LoopConfig
from sora_jax.train.metrics import DataSummary


class Objective(Protocol):
    """A model, its data and its loss. Models are NNX modules used as plain pytrees; a batch is any pytree of arrays.

    Attributes:
      schema: the dataclass of a run's whole configuration, whose defaults are filled in.
    """

    schema: ClassVar[type[LoopConfig]]

    def init(self, key: jax.Array) -> Any:
        """A fresh model.

        An objective that has an attribute `initial`, a model of the same shapes, begins with that instead. It is read
        outside of any program, only where a run begins.
        """

    def loss(
        self, model: Any, batch: Any, key: jax.Array, *frozen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, a scalar, and further scalars for the log; every random draw is of `key`.

        An objective that has an attribute `frozen`, a tree of arrays that nothing changes, is given that too.
        """

    def data(self, config: ConfigDict, share: Share) -> grain.IterDataset:
        """Batches of NumPy arrays, checkpointable: of the global batch the part that `share` says is this host's."""

    def heldout_data(self, share: Share, batches: int) -> Sequence[Any]:
        """So many batches of what training doesn't see, as `data` gives them; none where nothing is held out."""

    def flops(self, batch: Any) -> float:
        """Of a forward and backward pass over a batch of this host."""

    def tokens(self, batch: Any) -> tuple[int, int]:
        """Tokens of a batch of this host, and positions that they could have taken, padding included."""

    def sample_sheet(self, model: Any, step: int, *frozen: Any) -> PIL.Image.Image | None:
        """A picture of what the model does by now; None where there is nothing to show. `frozen` as for `loss`."""

    def data_summary(self) -> DataSummary | None:
        """What the data are and what of them was skipped; None where there is nothing to say."""
