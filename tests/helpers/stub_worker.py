"""In place of `sora_jax.sweep.worker` in tests of the runner: what a run's labels say, without JAX.

"good" writes its row; "bad" one that failed; "killed" ends by a signal; "silent" ends without a row; "slow" runs until
it is told to stop, and then exits as a worker does that has saved. starts.txt has a line, the process's id, a start.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import signal
import sys
import time


def work(folder: pathlib.Path) -> None:
    with open(folder / ".lock", "ab") as lock, open(folder / "starts.txt", "a") as starts:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starts.write(f"{os.getpid()}\n")
        starts.flush()
        row = json.loads((folder / "point.json").read_text())["row"]
        kind = row["labels"]["kind"]
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "silent":
            sys.exit(1)
        if kind == "slow" and not (folder / "be_quick").exists():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
            time.sleep(120)
        bad = kind == "bad"
        row |= {"status": "failed" if bad else "done", "error": "It is bad: be good." if bad else None}
        row |= {"metrics": {} if bad else {"loss": 1.0 + row["seed"]}, "finished": "2026-12-01T00:00:00"}
        (folder / "part").write_text(json.dumps(row))
        os.replace(folder / "part", folder / "result.json")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        work(pathlib.Path(name))
