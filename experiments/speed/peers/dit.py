"""`sora_jax.models.dit` in PyTorch, eager, as its users would write it: the same arithmetic on the same weights.

A row's tokens come as one list, each run's words before its patches. Attention is `scaled_dot_product_attention`,
in two ways: one call with a mask of runs, and a call for each run. Tables of a few rows (the Fourier features of σ,
the angles of the rotary embedding) are inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Request, Way, load, step, without_gradient
from torch import nn


class Block(nn.Module):
    """adaLN-Zero around attention and an MLP; query and key are normalised and turned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.qk_scale = nn.Parameter(torch.ones(2, width // heads))

    def forward(self, x, condition, index, turn, attend):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[index].chunk(6, -1)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(len(x), 3 * self.heads, -1).transpose(0, 1).chunk(3)
        q, k = (rotate(norm(part, scale), turn) for part, scale in zip((q, k), self.qk_scale, strict=True))
        x = x + gate1 * self.out(attend(q, k, v).transpose(0, 1).reshape(len(x), -1))
        h = norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class DiT(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, channels: int, text_width: int, sigma_width: int
    ) -> None:
        super().__init__()
        self.patch_in, self.text_in = nn.Linear(channels, width), nn.Linear(text_width, width)
        self.sigma_in, self.sigma_out = nn.Linear(sigma_width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.modulation, self.patch_out = nn.Linear(width, 2 * width), nn.Linear(width, channels)

    def forward(self, patches, words, sigma, lengths, turn, attend):
        """Lists of patches and of words, one of each a run; the velocity of all patches."""
        runs = zip(self.text_in(norm(torch.cat(words))).split([len(w) for w in words]), patches, strict=True)
        x = torch.cat([part for text, patch in runs for part in (text, self.patch_in(patch))])
        index = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        condition = F.silu(self.sigma_out(F.silu(self.sigma_in(sigma))))
        for block in self.blocks:
            x = block(x, condition, index, turn, attend)
        shift, scale = self.modulation(condition)[index].chunk(2, -1)
        out = self.patch_out(norm(x) * (1 + scale) + shift).split(lengths.tolist())
        return torch.cat([run[len(text) :] for run, text in zip(out, words, strict=True)])


def norm(x, scale=None):
    return F.rms_norm(x, x.shape[-1:], scale, 1e-6)


def rotate(x, turn):
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_mask(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    mask = ids[:, None] == ids[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def by_run(lengths):
    sizes = lengths.tolist()

    def attend(q, k, v):
        runs = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in run))[0] for run in runs], 1)

    return attend


def ways(request: Request) -> dict[str, Way]:
    shape = [request.settings[name] for name in ("width", "layers", "heads")]
    words, sigma = request.tensor("words"), request.tensor("sigma")
    patches, target = (
        request.tensor(name).split(request.settings["lengths"]) for name in ("patches", "target")
    )
    model = DiT(*shape, patches[0].shape[-1], words.shape[-1], sigma.shape[-1])
    load(model, request.arrays, "blocks")
    model = request.ready(model)
    if request.settings["compile"]:
        for block in model.blocks:  # alike, so compiled once
            block.compile()
    turn = request.tensor("cos"), request.tensor("sin")
    lengths = torch.tensor([len(words[0]) + len(run) for run in patches], device=words.device)
    target = torch.cat(target)
    found = {}
    for name, attend in (("run by run", by_run(lengths)), ("one mask", by_mask(lengths))):

        def forward(attend=attend):
            return model(patches, [*words], sigma, lengths, turn, attend)

        def losses(forward=forward):
            yield (forward() - target).square().mean()

        once = step(model, losses) if request.work == "training step" else without_gradient(forward)
        # A step has changed the weights: only work that leaves them as they are is compared.
        found[name] = Way(model, once, True, None if request.work == "training step" else forward)
    return found
