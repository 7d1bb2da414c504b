"""The same metrics by a plain loop in PyTorch, a clip at a time, as evaluation scripts are written.

python torch_loop.py FOLDER METRICS FRAMES   (FOLDER has own/, real/ and i3d.npz; see benchmark.py)
"""

import itertools
import json
import pathlib
import resource
import sys
import time

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as ms_ssim,
)
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

# As sora_jax reads colours, so that both measure the same pixels.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
BLOCKS = ("3b", "3c", "pool4", *(f"4{letter}" for letter in "bcdef"), "pool5", "5b", "5c")


def read(path: pathlib.Path, frames: int) -> torch.Tensor:
    with av.open(str(path)) as container:
        few = itertools.islice(container.decode(video=0), frames)
        shown = [frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in few]
    return torch.from_numpy(np.stack(shown)).float()


def same(x: torch.Tensor, window: tuple[int, ...], stride: tuple[int, ...], value: float) -> torch.Tensor:
    """Pads as TensorFlow's "SAME" does."""
    pads = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(window), reversed(stride)):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class I3D:
    """I3D with kernels and biases that have their normalization folded in."""

    def __init__(self, path: pathlib.Path) -> None:
        arrays = dict(np.load(path))
        self.kernels = {
            name.removesuffix(".kernel"): torch.from_numpy(
                np.ascontiguousarray(np.moveaxis(a, (-1, -2), (0, 1)))
            )
            for name, a in arrays.items()
            if name.endswith(".kernel")
        }
        self.biases = {
            name.removesuffix(".bias"): torch.from_numpy(a)
            for name, a in arrays.items()
            if name.endswith(".bias")
        }

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        kernel, strides = self.kernels[name], (stride,) * 3
        return F.conv3d(same(x, kernel.shape[2:], strides, 0.0), kernel, self.biases[name], strides)

    def pool(self, x: torch.Tensor, window: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        return F.max_pool3d(same(x, window, stride, float("-inf")), window, stride)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        def unit(part: str, y: torch.Tensor) -> torch.Tensor:
            return F.relu(self.conv(f"Mixed_{name}/{part}", y))

        return torch.cat(
            [
                unit("Branch_0/Conv3d_0a_1x1", x),
                unit("Branch_1/Conv3d_0b_3x3", unit("Branch_1/Conv3d_0a_1x1", x)),
                unit("Branch_2/Conv3d_0b_3x3", unit("Branch_2/Conv3d_0a_1x1", x)),
                unit("Branch_3/Conv3d_0b_1x1", self.pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            1,
        )

    def __call__(self, clip: torch.Tensor) -> np.ndarray:
        x = F.interpolate(clip.permute(0, 3, 1, 2), (224, 224), mode="bilinear", align_corners=False)
        x = (x / 127.5 - 1).transpose(0, 1)[None]
        x = self.pool(F.relu(self.conv("Conv3d_1a_7x7", x, 2)), (1, 3, 3), (1, 2, 2))
        x = F.relu(self.conv("Conv3d_2c_3x3", F.relu(self.conv("Conv3d_2b_1x1", x))))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        for name in BLOCKS:
            if name.startswith("pool"):
                side = 3 if name == "pool4" else 2
                x = self.pool(x, (side,) * 3, (2, 2, 2))
            else:
                x = self.block(name, x)
        x = self.conv("Logits/Conv3d_0c_1x1", F.avg_pool3d(x, (2, 7, 7), 1))
        return x.mean((2, 3, 4))[0].numpy()


def measure(pair: list[torch.Tensor], metrics: list[str], i3d: I3D | None) -> dict:
    own, real = pair
    luma = [(each @ LUMA)[:, None] for each in pair]
    out: dict = {}
    if "psnr" in metrics:
        out["psnr"] = 10 * np.log10(255**2 / ((own - real) ** 2).mean().item())
    if "ssim" in metrics:
        out["ssim"] = ssim(*luma, data_range=255.0).item()
    if "ms_ssim" in metrics:
        scales = min(len(BETAS), (min(own.shape[1:3]) // 11).bit_length())
        betas = (
            BETAS[:scales] if scales == len(BETAS) else tuple(b / sum(BETAS[:scales]) for b in BETAS[:scales])
        )
        out["ms_ssim"] = ms_ssim(*luma, data_range=255.0, betas=betas).item()
    if "temporal_flicker" in metrics:
        out["temporal_flicker"] = 1 - own.diff(dim=0).abs().mean().item() / 255
    if i3d:
        out["features"] = [i3d(own), i3d(real)]
    return out


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    def factor(rows: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
        return vectors * np.sqrt(np.maximum(values, 0))

    a, b = factor(one), factor(other)
    cross = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def main() -> None:
    root, metrics, frames = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
    i3d = I3D(root / "i3d.npz") if "fvd" in metrics else None
    names = sorted(path.name for path in (root / "own").iterdir())
    with torch.inference_mode():
        for name in names[:2]:
            measure([read(root / folder / name, frames) for folder in ("own", "real")], metrics, i3d)
        started = time.perf_counter()
        rows = [
            measure([read(root / f / name, frames) for f in ("own", "real")], metrics, i3d) for name in names
        ]
        figures = {
            name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "features"
        }
        if i3d:
            sets = (np.stack([row["features"][k] for row in rows]).astype(np.float64) for k in range(2))
            figures["fvd"] = frechet(*sets)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "clips_per_second": len(names) / seconds,
                "peak_mib": peak,
                "figures": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
