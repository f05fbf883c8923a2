#!/bin/sh
# Install a built package into an empty environment and use it: tools/smoke_test.sh FILE.whl
# A model is made, saved, loaded by Transformers and asked for text. Nothing of the checkout is used.
set -eu

[ $# -eq 1 ] && [ -f "$1" ] || { echo "usage: tools/smoke_test.sh FILE.whl" >&2; exit 2; }
package=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"${PYTHON:-python3}" -m venv empty
empty/bin/python -m pip install --disable-pip-version-check -q "$package"
empty/bin/mor version
empty/bin/mor recipes
empty/bin/python - <<'END'
import mor
import torch
from transformers import AutoModelForCausalLM

config = mor.MoRConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_recursions=2,
    num_recursion_layers=1, router="threshold",
)
mor.MoRForCausalLM(config).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
assert text.shape == (1, 7), text.shape
print("the package works:", mor.__version__)
END
