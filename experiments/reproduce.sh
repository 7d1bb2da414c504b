#!/usr/bin/env bash
# One ablation of configs/ablations from nothing: its sweep, its table and its plot.
#
#     experiments/reproduce.sh resolution            # as long as the docstring of configs/ablations/resolution.py says
#     experiments/reproduce.sh resolution --debug    # all parts in a few minutes, in which nothing is learned
#
# Further words go to the sweep: --jobs 2, --config.steps=300. It may be stopped, and goes on when started again.
# Needs .venv (make test sets it up), or a Python with sora_jax[eval] as PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: experiments/reproduce.sh NAME [--debug] [options of sora-jax sweep]; NAME is one of"
names=$(for path in configs/ablations/*.py; do basename "$path" .py; done | tr '\n' ' ')
name=${1:-}
if [ -z "$name" ] || [ ! -f "configs/ablations/$name.py" ]; then
    echo "error: there is no ablation '$name'; $usage $names" >&2
    exit 2
fi
shift
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c "" 2>/dev/null; then
    echo "error: there is no $python: run make test once, or set PYTHON to one that has sora_jax[eval]." >&2
    exit 2
fi

result=$name
for word in "$@"; do
    if [ "$word" = --debug ]; then result=$name-debug; fi
done
out=runs/sweeps/$result
"$python" -m sora_jax.cli.main sweep "$name" --out "$out" "$@"
"$python" -m sora_jax.cli.main sweep table "$out" --markdown "$out/table.md" --plot "$out/table.png" >/dev/null
echo "table: $out/table.md, plot: $out/table.png, runs: $out/results.jsonl"
