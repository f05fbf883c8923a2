#!/bin/sh
# Build the source package, and the wheel from it, into FOLDER: tools/build.sh PYTHON FOLDER
# With the setuptools that PYTHON has: no network. `make package` calls this.
set -eu

python=$1
folder=$2
rm -rf "$folder"
mkdir -p "$folder"
"$python" -c 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv.pop())' \
    "$folder" >"$folder/build.log" 2>&1 || { cat "$folder/build.log" >&2; exit 1; }
rm "$folder/build.log"
"$python" -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation \
    -w "$folder" "$folder"/*.tar.gz
