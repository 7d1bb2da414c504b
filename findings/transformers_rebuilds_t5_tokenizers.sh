#!/usr/bin/env bash
# transformers 5.24.0: T5TokenizerFast, and AutoTokenizer for a T5, take from a folder's tokenizer.json the vocabulary
# alone and build a normalizer and a pre-tokenizer of their own; what the file says of these is dropped without a word.
# The tokenizers package, which gave the file its format and which other programs read it with, follows it. So the same
# folder gives other ids in both, and prompts other states. PreTrainedTokenizerFast keeps what the file says. Seen for
# a tokenizer that makes letters small: "tokenizers 3 4 5 1, T5TokenizerFast 2 2 5 1 (its normalizer: none),
# PreTrainedTokenizerFast 3 4 5 1".
set -euo pipefail
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.1[123].*/bin/python; do
  if "$name" -c "" 2>/dev/null; then python=$name; break; fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${python:?Python 3.11 to 3.13 is needed}" -m venv "$folder/env"
"$folder/env/bin/pip" install -q "transformers==5.24.0" "numpy==2.2.6"
cat > "$folder/program.py" <<'PYTHON'
import json
import pathlib
import sys

import tokenizers
import transformers

folder = pathlib.Path(sys.argv[1])
words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁red", -2.0), ("▁circle", -2.0)]
own = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=2))
own.normalizer = tokenizers.normalizers.Lowercase()
own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
own.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
own.save(str(folder / "tokenizer.json"))
special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **special}))
prompt = "A RED circle"
written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
show = lambda ids: " ".join(map(str, ids))
told = [f"tokenizers {show(written.encode(prompt).ids)}"]
rebuilt = transformers.T5TokenizerFast.from_pretrained(folder)
kept = "none" if rebuilt.backend_tokenizer.normalizer is None else "the file's"
told.append(f"T5TokenizerFast {show(rebuilt(prompt).input_ids)} (its normalizer: {kept})")
faithful = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
told.append(f"PreTrainedTokenizerFast {show(faithful(prompt).input_ids)}")
print(", ".join(told))
PYTHON
mkdir "$folder/model"
seen="$("$folder/env/bin/python" "$folder/program.py" "$folder/model" 2>/dev/null)"
echo "$seen"
wanted="tokenizers 3 4 5 1, T5TokenizerFast 2 2 5 1 (its normalizer: none), PreTrainedTokenizerFast 3 4 5 1"
[ "$seen" = "$wanted" ] || { echo "changed: '$wanted' was seen before"; exit 1; }
