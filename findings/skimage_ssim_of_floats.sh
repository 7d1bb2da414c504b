#!/usr/bin/env bash
# scikit-image 0.19.3, the newest that OpenSTL's requirements allow (<= 0.19.3): structural_similarity of floating-point
# images without `data_range` takes a range of 2, that of its float images from -1 to 1, and says nothing. OpenSTL gives
# it frames from 0 to 1, so the SSIM in its tables of Moving MNIST (ConvLSTM .9288, SimVP-v2 .9402, TAU .9454) has
# constants four times as large as a range of 1 would give, and is higher. From 0.20 on the same call is refused; who
# then writes data_range=1, as the error suggests, gets figures that can't be compared with those tables. Seen on a
# frame with two blurred squares and noise of deviation 0.05: "0.19.3: no range 0.6777, range 2 0.6777, range 1 0.4883;
# 0.26.0: no range ValueError, range 2 0.6777, range 1 0.4883".
set -euo pipefail
for name in python3.10 python3.9 python3.8 "$HOME"/.pyenv/versions/3.{10,9,8}.*/bin/python; do
  if "$name" -c "" 2>/dev/null; then old=$name; break; fi
done
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.1[123].*/bin/python; do
  if "$name" -c "" 2>/dev/null; then new=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${old:?Python 3.8, 3.9 or 3.10 is needed for scikit-image 0.19.3}" -m venv "$folder/old"
"${new:?Python 3.11 to 3.13 is needed for scikit-image 0.26.0}" -m venv "$folder/new"
"$folder/old/bin/pip" install -q "scikit-image==0.19.3" "numpy==1.23.5" "scipy==1.10.1"
"$folder/new/bin/pip" install -q "scikit-image==0.26.0" "numpy==2.2.6"
cat > "$folder/program.py" <<'PYTHON'
import numpy as np
import skimage
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

true = np.zeros((64, 64))
true[10:30, 12:32] = true[35:55, 30:50] = 1.0
true = gaussian_filter(true, 1.0)
noisy = np.clip(true + np.random.RandomState(0).normal(0, 0.05, true.shape), 0, 1)
told = []
for name, options in {"no range": {}, "range 2": {"data_range": 2}, "range 1": {"data_range": 1}}.items():
    try:
        told.append(f"{name} {structural_similarity(noisy, true, **options):.4f}")
    except ValueError as error:
        told.append(f"{name} {type(error).__name__}")
print(f"{skimage.__version__}: {', '.join(told)}")
PYTHON
seen="$("$folder/old/bin/python" "$folder/program.py" 2>&1); $("$folder/new/bin/python" "$folder/program.py" 2>&1)"
echo "$seen"
wanted="0.19.3: no range 0.6777, range 2 0.6777, range 1 0.4883; 0.26.0: no range ValueError, range 2 0.6777, range 1 0.4883"
[ "$seen" = "$wanted" ] || { echo "changed: '$wanted' was seen before"; exit 1; }
