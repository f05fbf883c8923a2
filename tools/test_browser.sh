#!/bin/sh
# The playground's tests in a real Chromium: tools/test_browser.sh VENV [CONSTRAINTS [PYTEST_ARGS...]]
# `make test-browser` calls this. What is missing is fetched: playwright with pip into VENV, Chromium
# by tools/get_browser.sh. Where that cannot be done the tests are skipped, with the reason.
set -eu

venv=$1
constraints=${2:-}
[ $# -lt 2 ] || shift
shift
skip() { printf '==> skipped: %s\n' "$*"; exit 0; }

browser=$(sh "$(dirname "$0")/get_browser.sh") || skip "no browser, as said above"
if ! "$venv/bin/python" -c 'import playwright' 2>/dev/null; then
    echo '==> pip install playwright'
    timeout 180 "$venv/bin/python" -m pip install --disable-pip-version-check -qq \
        ${constraints:+--constraint "$constraints"} 'playwright>=1.45' || skip "pip could not install playwright"
fi
CHROMIUM=$browser exec "$venv/bin/python" -m pytest "$@" tests/server/test_playground.py tests/server/test_playground_media.py
