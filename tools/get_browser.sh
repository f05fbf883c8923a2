#!/bin/sh
# Print the path of a Chromium. Where there is none it is installed with apt-get if CI is set and this
# is root (nobody's own machine is changed unasked); else the reason why not is said, and 1 returned.
set -eu

fail() { printf '%s\n' "$*" >&2; exit 1; }

find_browser() {
    for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        [ -n "$name" ] && command -v "$name" 2>/dev/null && return
    done
    return 1
}

find_browser && exit
[ -n "${CI:-}" ] || fail "no Chromium here; install one (apt-get install chromium), or name it: CHROMIUM=PATH"
command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || fail "no Chromium, and no apt-get as root to get one"
echo '==> apt-get install chromium' >&2
{
    timeout 60 apt-get -qq update &&
        DEBIAN_FRONTEND=noninteractive timeout 180 apt-get -qq -y --no-install-recommends install chromium
} >/dev/null 2>&1 || fail "apt-get could not install chromium"
find_browser || fail "apt-get installed no Chromium that is in PATH"
