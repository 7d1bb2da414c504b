"""`sora_jax.models.vae` in PyTorch, eager: the same arithmetic on the same weights, in two memory formats.

Tensors are [B, C, T, Y, X] in both, as conv3d takes them; "channels last" lays the channels innermost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import Request, Way, load, without_gradient
from torch import nn


class Conv(nn.Conv3d):
    """Causal: two steps of zeros before the first."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 3, padding=(0, 1, 1))

    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, width))
        self.first, self.second = Conv(width, width), Conv(width, width)

    def forward(self, x):
        h = self.first(F.silu(norm(x, self.scale[0])))
        return x + self.second(F.silu(norm(h, self.scale[1])))


class Pointwise(nn.Linear):
    """A linear layer over channels."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class VAE(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.strides, self.channels = config["strides"], config["channels"]
        folds = [math.prod(stride) for stride in self.strides]
        encoder, decoder = config["encoder_widths"], config["decoder_widths"]
        before, after = [3, *encoder[:-1]], [3, *decoder[:-1]]
        self.down = nn.ModuleList(Pointwise(f * i, o) for f, i, o in zip(folds, before, encoder))
        self.encoder = stages(encoder, config["encoder_blocks"])
        self.to_moments = Pointwise(encoder[-1], 2 * self.channels)
        self.from_channels = Pointwise(self.channels, decoder[-1])
        self.decoder = stages(decoder, config["decoder_blocks"])
        self.up = nn.ModuleList(Pointwise(i, f * o) for f, i, o in zip(folds, decoder, after))

    def encode(self, x):
        """The latent's mean."""
        repeats = math.prod(stride[0] for stride in self.strides) - 1
        x = torch.cat([x[:, :, :1].expand(-1, -1, repeats, -1, -1), x], dim=2)
        for i, (stride, down, blocks) in enumerate(zip(self.strides, self.down, self.encoder)):
            x = fold(x, stride)
            x = down(haar(x) if i == 0 else x)
            for block in blocks:
                x = block(x)
        return self.to_moments(x)[:, : self.channels]

    def decode(self, x):
        x = self.from_channels(x)
        for i in reversed(range(len(self.strides))):
            for block in self.decoder[i]:
                x = block(x)
            x = self.up[i](x)
            x = unfold(haar(x) if i == 0 else x, self.strides[i])
        return x[:, :, math.prod(stride[0] for stride in self.strides) - 1 :]


def stages(widths, blocks):
    return nn.ModuleList(nn.ModuleList(Block(w) for _ in range(n)) for w, n in zip(widths, blocks))


def norm(x, scale):
    return F.rms_norm(x.movedim(1, -1), scale.shape, scale, 1e-6).movedim(-1, 1)


def fold(x, stride):
    (B, C, T, Y, X), (a, b, c) = x.shape, stride
    x = x.reshape(B, C, T // a, a, Y // b, b, X // c, c).permute(0, 3, 5, 7, 1, 2, 4, 6)
    return x.reshape(B, -1, T // a, Y // b, X // c)


def unfold(x, stride):
    (B, _, T, Y, X), (a, b, c) = x.shape, stride
    x = x.reshape(B, a, b, c, -1, T, Y, X).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return x.reshape(B, -1, T * a, Y * b, X * c)


def haar(x):
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype, device=x.device) / math.sqrt(2)
    h8 = torch.kron(torch.kron(h2, h2), h2)
    return torch.einsum("bictyx,ij->bjctyx", x.unflatten(1, (8, -1)), h8).flatten(1, 2)


def ways(request: Request) -> dict[str, Way]:
    found = {}
    for name, layout in (
        ("channels last", torch.channels_last_3d),
        ("channels first", torch.contiguous_format),
    ):
        model = VAE(request.settings["config"])
        load(model, request.arrays)
        model = request.ready(model).to(memory_format=layout)
        x = request.tensor("input").movedim(-1, 1).contiguous(memory_format=layout)
        work = getattr(model, request.work)
        if request.settings["compile"]:
            work = torch.compile(work)

        def forward(work=work, x=x):
            return work(x)

        found[name] = Way(model, without_gradient(forward), True, lambda f=forward: f().movedim(1, -1))
    return found
