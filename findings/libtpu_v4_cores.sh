#!/usr/bin/env bash
# libtpu 0.0.52 (jax 0.10.2): a described TPU v4 slice is not the one that its machines run. By default "v4:2x2x1" has
# eight devices of half a chip's memory (15.25 GiB), as if its four chips were split into cores; JAX on a v4 machine has
# four, each a chip. chip_config_name="megacore" describes those: four devices of 30.75 GiB. So ahead-of-time plans for
# v4 shard over twice the devices and run out of memory at half of what there is, unless the name is given.
set -euo pipefail
for name in python3.13 python3.12 python3.11; do
  if "$name" -c "" 2>/dev/null; then python=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:?Python 3.11 to 3.13 is needed}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_STDERR_LOG_LEVEL=3 TPU_MIN_LOG_LEVEL=3
export TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v4-8
"$folder/venv/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies


def seen(**layout):
    devices = topologies.get_topology_desc("v4:2x2x1", platform="tpu", **layout).devices
    here = jax.sharding.SingleDeviceSharding(devices[0])
    large = jax.ShapeDtypeStruct((2**16, 2**20), jnp.float32, sharding=here)
    try:
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T, out_shardings=here).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        room = re.search(r"exceeds available HBM \(([0-9.]+)G\)", str(error)).group(1)
    return len(devices), float(room)


default, joined = seen(), seen(chip_config_name="megacore")
print("default: %d devices of %.2f GiB; megacore: %d of %.2f" % (*default, *joined))
assert default == (8, 15.25) and joined == (4, 30.75), "this has changed"
PYTHON
