"""What is measured, the same of both sides: sizes, prompts, and how it is timed."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Any

PROMPT = " ".join(f"w{i}" for i in range(100, 120))  # of the random folder's tokenizer; twenty tokens
FORWARD = {
    "forward-1280": (5, 32, 32),
    "forward-4096": (4, 64, 64),
}  # latent frames, height, width; 2x2 a token
DECODE = (17, 256, 256)
GENERATE = {"frames": 17, "height": 256, "width": 256, "steps": 4}
FIRST_STEP = {"frames": 1, "height": 256, "width": 256, "steps": 1}
# Four requests: frames, height, width.
QUEUES = {
    "queue-small": [(1, 128, 128), (5, 128, 96), (9, 96, 128), (5, 96, 96)],
    "queue-medium": [(5, 256, 256), (9, 192, 256), (13, 192, 192), (5, 256, 192)],
    "queue-large": [(9, 384, 384), (13, 320, 384), (17, 320, 320), (9, 384, 320)],
}
QUEUE_STEPS, GUIDANCE = 4, 5.0


def tokens(frames: int, height: int, width: int) -> int:
    """Of a video, by Wan 2.1: cells of 4 frames and 8x8 pixels, 2x2 of them a token."""
    return (1 + (frames - 1) // 4) * (height // 16) * (width // 16)


def timed(call: Callable[[], Any], times: int = 3) -> dict[str, float]:
    """The least seconds and processor seconds of several calls after a first one."""
    call()
    rows = []
    for _ in range(times):
        begun = time.perf_counter(), time.process_time()
        call()
        rows.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return {"seconds": min(row[0] for row in rows), "processor": min(row[1] for row in rows)}


def report(**values: Any) -> None:
    """One line of JSON, with the process's peak memory in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(values | {"peak": round(peak, 3)}), flush=True)
