#!/bin/sh
# Make the virtual environment and install mor into it. `make setup` calls this; run it by hand as
#     tools/setup.sh VENV CONSTRAINTS [PYTHON [EXTRAS]]
# An empty CONSTRAINTS installs without pins and leaves a torch that is already in VENV alone.
# Nothing outside VENV is changed, and running it again is safe.
set -eu

venv=$1
constraints=$2
wanted=${3:-}
extras=${4:-dev}
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

say() { printf '==> %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# A name can be on the PATH and still not run (pyenv's shims), so each candidate is run.
find_python() {
    for candidate in ${wanted:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c "$in_range" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    [ -z "$wanted" ] || die "PYTHON=$wanted is not a Python 3.11, 3.12 or 3.13 that runs"
    die "found no Python 3.11, 3.12 or 3.13; install one, or name it: make setup PYTHON=/path/to/python3.12"
}

[ -z "$constraints" ] || [ -f "$constraints" ] || die "CONSTRAINTS=$constraints is not a file"

if "$venv/bin/python" -c '' >/dev/null 2>&1; then
    "$venv/bin/python" -c "$in_range" ||
        die "$venv holds $("$venv/bin/python" --version), outside 3.11 to 3.13; remove it and run again"
    [ -z "$wanted" ] || say "$venv is there already, PYTHON=$wanted is not used (make distclean removes it)"
else
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$python cannot make virtual environments; on Debian or Ubuntu install python3-venv"
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    # The pip that comes with a Python can be years old, and take minutes to choose among releases.
    "$venv/bin/python" -m pip install --disable-pip-version-check -qq --upgrade pip ||
        say "the newest pip cannot be had; going on with $("$venv/bin/python" -m pip --version | cut -d' ' -f1,2)"
fi
# An environment that another tool made may come without pip.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null

if [ -n "$constraints" ]; then
    say "installing mor and its tools, pinned by $constraints (a few minutes the first time)"
else
    say "installing mor and its tools without pins (CONSTRAINTS is empty)"
fi
# Twice quiet: errors only. In CI modules are compiled when imported: most never are.
"$venv/bin/python" -m pip install --disable-pip-version-check -qq ${CI:+--no-compile} \
    ${constraints:+--constraint "$constraints"} --editable ".[$extras]"

"$venv/bin/python" -c 'import platform, torch
print(f"==> ready: Python {platform.python_version()}, torch {torch.__version__}")'
