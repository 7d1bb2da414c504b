#!/usr/bin/env bash
# jax 0.12.0.1, CPU (0.10.2 kept them): with --xla_cpu_experimental_onednn_custom_call=true a program with a convolution is
# never kept by JAX's persistent compilation cache. Writing the entry raises "MemoryError: std::bad_alloc", with
# gigabytes free and kilobytes to write; JAX turns that into a UserWarning, so each start of each process compiles the
# program again. A plain matrix product is kept under the same flag, and without the flag both are. Seen:
# "product kept, convolution not kept" with it, "product kept, convolution kept" without.
set -euo pipefail
for name in python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23].*/bin/python; do
  if "$name" -c "" 2>/dev/null; then python=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:?Python 3.12 or 3.13 is needed}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
cat > "$folder/program.py" <<'PYTHON'
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp

x = jnp.ones((1, 4, 16, 16, 32), jnp.bfloat16)
kernel = jnp.ones((3, 3, 3, 32, 32), jnp.bfloat16)


def product(x, kernel):
    return x @ kernel[0, 0, 0]


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(product)(x, kernel).block_until_ready()
    jax.jit(convolution)(x, kernel).block_until_ready()
files = [path.name for path in pathlib.Path(sys.argv[1]).iterdir()]
kept = {name: any(f"jit_{name}" in file for file in files) for name in ("product", "convolution")}
print(*(f"{name} {'kept' if found else 'not kept'}" for name, found in kept.items()), sep=", ")
print(*{str(one.message).partition(": ")[2] for one in caught}, sep="\n", file=sys.stderr)
PYTHON
for flag in true false; do
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_cpu_experimental_onednn_custom_call=$flag"
  export JAX_COMPILATION_CACHE_DIR="$folder/$flag" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder/$flag" 2>"$folder/warned")
  echo "onednn_custom_call=$flag: $seen $(tr '\n' ' ' <"$folder/warned")"
  if [ "$flag" = true ]; then wanted="product kept, convolution not kept"; else wanted="product kept, convolution kept"; fi
  [ "$seen" = "$wanted" ] || { echo "changed: '$wanted' was seen before"; exit 1; }
done
