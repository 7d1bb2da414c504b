"""The torch side: `python worker.py` reads one JSON request a line and answers each with one line; no JAX in here.

  {"part": …, "work": …, "dtype": …, "arrays": npz file, …}   builds the ways of doing that work, calls each once:
      {"ways": {name: {"first": seconds, "gflop": …, "parameters": …, "same": …, "difference": …}},
       "missing": [sentence, …]}
  {"time": name}                                              calls one of them again: {"seconds": …}

A way's `difference` is that of its result from the one in the file, in standard deviations of that; null where the
way computes something else. `gflop` is counted by torch while it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import DEVICE, Request, Way
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

MODULES = {
    "dit": ("dit", "diffusers_dit"),
    "vae": ("vae", "diffusers_vae"),
    "text": ("bert",),
}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print; only answers go out
    torch.manual_seed(0)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it by default
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    ways: dict[str, Way] = {}

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    answer({"torch": torch.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        if "time" in asked:
            answer({"seconds": seconds(ways[asked["time"]].once)})
            continue
        ways.clear()  # frees the last models before the next
        with np.load(asked.pop("arrays")) as file:
            request = Request(asked.pop("part"), asked.pop("work"), asked.pop("dtype"), dict(file), asked)
        missing = []
        for name in MODULES[request.part]:
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                missing.append(f"{name}: {error}")
            else:
                ways |= module.ways(request)
        answer({"ways": {name: first(way, request) for name, way in ways.items()}, "missing": missing})


def first(way: Way, request: Request) -> dict[str, Any]:
    """Calls it once: what it costs, and whether it is what it should be."""
    aten = torch.ops.aten  # torch has formulas of its own for other devices' attention
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        # Backward, with the scores recomputed, is five products to forward's two.
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda pulled, q, k, v, *_, **__: 5 * sdpa_flop_count(q, k, v) // 2
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.compiler.set_stance("force_eager"), counter:
        taken = seconds(way.once)
    if way.same and request.settings["compile"]:
        way.once()  # compiles
        taken = seconds(way.once)
    told: dict[str, Any] = {
        "first": taken,
        "gflop": counter.get_total_flops() / 1e9,
        "parameters": sum(p.numel() for p in way.model.parameters()),
        "same": way.same,
        "difference": None,
    }
    if way.compare and request.dtype == "float32":
        with torch.inference_mode(), exactly():
            ours = torch.from_numpy(request.arrays["expected"])
            told["difference"] = float((way.compare().cpu() - ours).abs().max() / ours.std())
    return told


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def seconds(once: Callable[[], Any]) -> float:
    started = time.perf_counter()
    once()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
