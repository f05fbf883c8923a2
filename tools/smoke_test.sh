#!/bin/sh
# Install built packages into an empty environment, with the newest dependencies, and use them:
#     tools/smoke_test.sh FILE.whl [FILE.tar.gz]
#     tools/smoke_test.sh --beside VENV FILE.whl
# From text to an answer over HTTP (tools/smoke_test.py); nothing of the checkout is used. The second
# form is the quick one: the wheel alone, with the libraries that VENV has. pip's own settings hold:
# PIP_CONSTRAINT=constraints.txt pins, PIP_EXTRA_INDEX_URL may name an index of small builds of torch.
set -eu

usage() { echo "usage: tools/smoke_test.sh [--beside VENV] FILE.whl [FILE.tar.gz]" >&2; exit 2; }
path_of() { [ -f "$1" ] || usage; printf '%s/%s\n' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"; }

beside=
if [ "${1:-}" = --beside ]; then
    [ $# -eq 3 ] && [ -x "$2/bin/python" ] || usage
    beside=$(cd "$2" && pwd)
    shift 2
fi
[ $# -ge 1 ] && [ $# -le 2 ] || usage
wheel=$(path_of "$1")
source=${2:+$(path_of "$2")}
script=$(cd "$(dirname "$0")" && pwd)/smoke_test.py
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
cd "$folder"

# What ran has to be what was installed.
try() {
    cp "$script" use.py
    found=$("$1" -c 'import mor_command, mor; print(mor.__file__)')
    case $found in "$folder"/*) ;; *) echo "smoke test: $found was used, not the package" >&2; exit 1 ;; esac
    "$1" use.py
}

if [ -n "$beside" ]; then
    # Ahead of what the environment has: PYTHONPATH comes before an editable install.
    "$beside/bin/python" -m pip install --disable-pip-version-check -q --no-deps --target package "$wheel"
    export PYTHONPATH="$folder/package"
    try "$beside/bin/python"
    exit
fi

"${PYTHON:-python3}" -m venv empty
empty/bin/python -m pip install --disable-pip-version-check -q "$wheel[serve]"
empty/bin/python -m pip check
empty/bin/python -m pip freeze | grep -iE "^(torch|transformers|numpy|safetensors|fastapi)=="
empty/bin/mor --version
try "$folder/empty/bin/python"
if [ -n "$source" ]; then
    echo "==> the same from the source package"
    empty/bin/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall "$source"
    try "$folder/empty/bin/python"
fi
