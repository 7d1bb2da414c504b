"""The same transformer in PyTorch, eager, as its users would write it; prints JSON for run.py, in a Python with torch.

Attention is `scaled_dot_product_attention`, in two ways: one call with a mask of runs, and a call for each run; the
faster is told.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """adaLN-Zero around attention and an MLP; query and key are normalised and turned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))

    def forward(self, x, condition, index, turn, attend):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[index].chunk(6, -1)
        h = F.rms_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(len(x), 3 * self.heads, -1).transpose(0, 1).chunk(3)
        head = q.shape[-1:]
        q, k = (
            rotate(F.rms_norm(q, head, self.q_scale), turn),
            rotate(F.rms_norm(k, head, self.k_scale), turn),
        )
        x = x + gate1 * self.out(attend(q, k, v).transpose(0, 1).reshape(len(x), -1))
        h = F.rms_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, channels: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(channels, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, condition, index, turn, attend):
        x = self.inner(x)
        for block in self.blocks:
            x = block(x, condition, index, turn, attend)
        return self.outer(F.rms_norm(x, x.shape[-1:]))


def rotate(x, turn):
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_mask(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = ids[:, None] == ids[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def by_run(lengths):
    def attend(q, k, v):
        runs = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in run))[0] for run in runs], 1)

    return attend


def main() -> None:
    asked = json.loads(sys.argv[1])
    width, layers, heads, lengths = (asked[name] for name in ("width", "layers", "heads", "lengths"))
    torch.set_num_threads(asked["threads"])
    n, channels = sum(lengths), 16
    angles = torch.randn(n, width // heads // 2)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    out = {}
    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        model = DiT(width, layers, heads, channels).to(kind)
        x, target = (torch.randn(n, channels, dtype=kind) for _ in range(2))
        condition = torch.randn(len(lengths), width, dtype=kind)
        turn = angles.cos().to(kind), angles.sin().to(kind)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for name, attend in (("mask", by_mask(lengths)), ("run by run", by_run(lengths))):

            def forward(model=model, attend=attend, x=x, condition=condition, turn=turn):
                with torch.no_grad():
                    model(x, condition, index, turn, attend)

            def train(
                model=model,
                attend=attend,
                x=x,
                condition=condition,
                turn=turn,
                target=target,
                optimizer=optimizer,
            ):
                loss = (model(x, condition, index, turn, attend) - target).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            for work, function in (("forward", forward), ("training step", train)):
                function()
                taken = []
                for _ in range(asked["repeats"]):
                    started = time.perf_counter()
                    function()
                    taken.append(time.perf_counter() - started)
                out[f"{work}, {dtype}, {name}"] = min(taken)
    print(json.dumps({"torch": torch.__version__, "seconds": out}))


main()
