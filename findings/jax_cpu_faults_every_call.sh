#!/usr/bin/env bash
# jax 0.12.0.1 on Linux CPUs: temporary memory above 32 MiB goes back to the kernel after each call of a compiled program
# and comes again, zeroed page by page, at the next: warming up changes nothing, nor do malloc's own thresholds, which
# end there. A program with a temporary of 64 MiB meets 16,400 page faults a call, as many with MALLOC_MMAP_THRESHOLD_
# and MALLOC_TRIM_THRESHOLD_ at 1 GiB, and a few hundred with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 where transparent huge
# pages are "madvise". A transformer's training step was 1.12 times as fast for it. The tunable is read
# before a process begins: setting it from Python is too late.
set -euo pipefail
for name in python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23].*/bin/python; do
  if "$name" -c "" 2>/dev/null; then python=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:?Python 3.12 or 3.13 is needed}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
export JAX_PLATFORMS=cpu
cat > "$folder/faults.py" <<'PYTHON'
import resource

import jax
import jax.numpy as jnp

step = jax.jit(lambda a, b: jnp.sin(a @ b) @ a)  # the first product is a temporary of 64 MiB
x = jnp.ones((4096, 64)), jnp.ones((64, 4096))
for _ in range(5):
    step(*x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(*x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
PYTHON
run() { env "$@" "$folder/venv/bin/python" "$folder/faults.py"; }
default=$(run A=)
kept=$(run MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824)
huge=$(run GLIBC_TUNABLES=glibc.malloc.hugetlb=1)
echo "page faults a call: $default by default, $kept with malloc's thresholds raised, $huge in huge pages"
case $(cat /sys/kernel/mm/transparent_hugepage/enabled 2>/dev/null || echo "[never]") in
  *"[always]"*) echo "huge pages come unasked here: there is nothing to see"; exit 0 ;;
  *"[never]"*) echo "huge pages are off here: the last figure says nothing" ;;
  *) [ "$huge" -lt $((default / 10)) ] || { echo "this has changed"; exit 1; } ;;
esac
[ "$default" -gt 16000 ] && [ "$kept" -gt 16000 ] || { echo "this has changed"; exit 1; }
