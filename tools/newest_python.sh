#!/bin/sh
# Prints the path of the Python that .venv is made with: the newest on this machine that sora_jax is known to run on.
# Every candidate is run, because a name may exist and yet refuse (a pyenv shim of a version that is not selected),
# lack the modules that make environments (Debian splits them off), or be a preview, for which there are no wheels.
set -u

candidates() {
    for name in python3.13 python3.12 python3.11 python3.14 python3 python; do
        printf '%s\n' "$PATH" | tr ':' '\n' | while IFS= read -r folder; do
            printf '%s\n' "${folder:-.}/$name"
        done
    done
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv" "$(pyenv root 2>/dev/null)"; do
        for python in "$root"/versions/*/bin/python; do
            printf '%s\n' "$python"
        done
    done
}

# Prints "rank patch path". On 3.11 to 3.13 the whole stack is known good (3.11 gets an older JAX); for 3.14 every
# part has wheels, but nobody has run the tests there yet, so it is taken only where it is alone.
probe='
import sys, sysconfig
import ensurepip, venv
rank = [(3, 13), (3, 12), (3, 11), (3, 14)].index(sys.version_info[:2])
assert sys.version_info[3] == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d %d %s" % (rank, sys.version_info[2], sys._base_executable))
'

best=$(
    candidates | while IFS= read -r python; do
        [ -x "$python" ] && "$python" -c "$probe" </dev/null 2>/dev/null
    done | sort -k1,1n -k2,2nr | head -n 1 | cut -d ' ' -f 3-
)
if [ -z "$best" ]; then
    echo "error: no Python 3.11 or newer with the venv module was found in PATH or pyenv: install one (from your" \
        "system's packages, or 'pyenv install 3.13'), or name it: make PYTHON=/path/to/python" >&2
    exit 1
fi
printf '%s\n' "$best"
