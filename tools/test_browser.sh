#!/bin/sh
# The playground's tests in a real Chromium: tools/test_browser.sh VENV [CONSTRAINTS [PYTEST_ARGS...]]
# `make test-browser` calls this. What is missing is fetched: playwright with pip into VENV, Chromium
# with apt-get where CI is set and this is root (nobody's own machine is changed unasked). Where that
# cannot be done the tests are skipped, with the reason.
set -eu

venv=$1
constraints=${2:-}
[ $# -lt 2 ] || shift
shift
skip() { printf '==> skipped: %s\n' "$*"; exit 0; }

find_browser() {
    for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        [ -n "$name" ] && command -v "$name" 2>/dev/null && return
    done
    return 1
}

if ! find_browser >/dev/null; then
    [ -n "${CI:-}" ] || skip "no Chromium here; install one (apt-get install chromium), or name it: CHROMIUM=PATH"
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || skip "no Chromium, and no apt-get as root to get one"
    echo '==> apt-get install chromium'
    {
        timeout 60 apt-get -qq update &&
            DEBIAN_FRONTEND=noninteractive timeout 180 apt-get -qq -y --no-install-recommends install chromium
    } >/dev/null 2>&1 || skip "apt-get could not install chromium"
    find_browser >/dev/null || skip "apt-get installed no Chromium that is in PATH"
fi
if ! "$venv/bin/python" -c 'import playwright' 2>/dev/null; then
    echo '==> pip install playwright'
    timeout 180 "$venv/bin/python" -m pip install --disable-pip-version-check -qq \
        ${constraints:+--constraint "$constraints"} 'playwright>=1.45' || skip "pip could not install playwright"
fi
CHROMIUM=$(find_browser) exec "$venv/bin/python" -m pytest "$@" tests/server/test_playground.py tests/server/test_playground_media.py
