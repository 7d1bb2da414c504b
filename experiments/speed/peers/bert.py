"""`BertModel` of `transformers` on our weights."""

from __future__ import annotations

import torch
from common import Request, Way, without_gradient
from transformers import BertConfig, BertModel


def ways(request: Request) -> dict[str, Way]:
    model = BertModel(BertConfig(**request.settings["config"]), add_pooling_layer=False)
    prefix = "weights/"
    model.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(array)
            for name, array in request.arrays.items()
            if name.startswith(prefix)
        }
    )
    model = request.ready(model)
    if request.settings["compile"]:
        model.compile()
    ids, mask = request.tensor("ids"), request.tensor("mask")

    def forward() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    # What stands in padding is nobody's.
    return {"BertModel": Way(model, without_gradient(forward), True, lambda: forward() * mask[..., None])}
