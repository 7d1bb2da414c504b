#!/usr/bin/env bash
# safetensors 0.8.0: save_file of NumPy arrays that aren't C-contiguous (a transpose, a slice with a step) writes the
# bytes from the array's first address on in the order they lie in memory, under the shape of the view: the file loads
# without an error and holds other numbers. Published PyTorch matrices are transposed by whoever converts them to JAX,
# so a converter that saves `weight.T` writes a scrambled model. numpy.ascontiguousarray before helps. Seen:
# "0.8.0: transposed, as saved [0, 3, 1, 4, 2, 5], as loaded [0, 1, 2, 3, 4, 5]; contiguous copy equal".
set -euo pipefail
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.1[123].*/bin/python; do
  if "$name" -c "" 2>/dev/null; then python=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:?Python 3.11 to 3.13 is needed}" -m venv "$folder/env"
"$folder/env/bin/pip" install -q "safetensors==0.8.0" "numpy==2.2.6"
cat > "$folder/program.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
save_file({"view": turned, "copy": np.ascontiguousarray(turned)}, sys.argv[1])
loaded = load_file(sys.argv[1])
whole = lambda array: [int(x) for x in array.ravel()]
same = "equal" if (loaded["copy"] == turned).all() else "differs"
print(
    f"{safetensors.__version__}: transposed, as saved {whole(turned)}, as loaded {whole(loaded['view'])}; "
    f"contiguous copy {same}"
)
PYTHON
seen="$("$folder/env/bin/python" "$folder/program.py" "$folder/file.safetensors" 2>&1)"
echo "$seen"
wanted="0.8.0: transposed, as saved [0, 3, 1, 4, 2, 5], as loaded [0, 1, 2, 3, 4, 5]; contiguous copy equal"
[ "$seen" = "$wanted" ] || { echo "changed: '$wanted' was seen before"; exit 1; }
