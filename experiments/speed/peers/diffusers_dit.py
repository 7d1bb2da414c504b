"""Transformers of `diffusers`, random weights, at the width, depth and heads of ours, on clips of the same lengths.

They take one shape a call and no mask, so clips of several lengths run one by one, or padded to the longest in one
batch. CogVideoX is the nearest to ours (words and patches in one stream, adaLN); Wan has cross-attention to the words.
"""

from __future__ import annotations

import torch
from common import DEVICE, Request, Way, step, without_gradient
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel


def cogvideox(width: int, heads: int, layers: int, text_width: int, channels: int, longest: int):
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        text_embed_dim=text_width,
        patch_size=1,
        use_rotary_positional_embeddings=True,
    )

    def call(patches, words, time):
        """[b, n, c] as clips of n frames of 1×1."""
        turn = torch.ones(2, patches.shape[1], width // heads, device=DEVICE).unbind()
        clips = patches[..., None, None]
        return model(clips, words, time, image_rotary_emb=turn, return_dict=False)[0][..., 0, 0]

    return model, call


def wan(width: int, heads: int, layers: int, text_width: int, channels: int, longest: int):
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_width,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=longest,
    )

    def call(patches, words, time):
        clips = patches.mT[..., None, None]
        return model(clips, time, words, return_dict=False)[0][..., 0, 0].mT

    return model, call


def ways(request: Request) -> dict[str, Way]:
    asked = request.settings
    patches, words = request.tensor("patches"), request.tensor("words")
    alone = [run[None] for run in patches.split(asked["lengths"])]
    longest = max(asked["lengths"])
    padded = patches.new_zeros(len(alone), longest, patches.shape[-1])
    for row, run in zip(padded, alone, strict=True):
        row[: run.shape[1]] = run[0]
    time = torch.full((len(alone),), 500, device=DEVICE)
    found = {}
    for name, build in (("CogVideoX", cogvideox), ("Wan", wan)):
        shape = (asked["width"], asked["heads"], asked["layers"], words.shape[-1], patches.shape[-1], longest)
        model, call = build(*shape)
        model = request.ready(model)

        def one_by_one(call=call):
            for i, run in enumerate(alone):
                yield call(run, words[i, None], time[i, None])

        def together(call=call):
            yield call(padded, words, time)

        for way, outputs in (("one by one", one_by_one), ("padded", together)):

            def losses(outputs=outputs):
                for out in outputs():
                    yield out.square().mean()

            training = request.work == "training step"
            once = step(model, losses) if training else without_gradient(lambda outputs=outputs: [*outputs()])
            found[f"{name}, {way}"] = Way(model, once)
    return found
