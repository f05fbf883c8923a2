"""API keys: what may be one, and where they come from. A mistake never leaves a server open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mor.errors import MorError

VARIABLE = "MOR_API_KEY"


def choose_keys(given: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the command line, or else the one key of ``MOR_API_KEY``, blanks and all.

    Args:
        given: of ``--api-key``; None or empty where it was not used.
        environment: of the process.

    Raises:
        MorError: a key that no client could send. So is a variable that is set to nothing: whoever
            sets it wants a key, and would get a server that is open to all.
    """
    if given:
        return check_keys(given)
    if VARIABLE not in environment:
        return ()
    try:
        return check_keys([environment[VARIABLE]])
    except MorError as error:
        raise MorError(f"{VARIABLE}: {error}; unset it for a server without keys") from None


def check_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """``keys``, each of which a client can send.

    Raises:
        MorError: one is empty, or holds what a header cannot carry. It does not quote the key.
    """
    if isinstance(keys, str):
        raise MorError("api_keys is one text; give a list of keys")
    for key in keys:
        if not key.strip():
            raise MorError("api_keys holds an empty key; leave it out or give a secret")
        if key != key.strip():
            raise MorError(
                "api_keys holds a key with a blank or a line end around it, which no header "
                "carries; take that away"
            )
        if not key.isprintable():
            raise MorError(
                "api_keys holds a key with a control character, which no header carries; give "
                "another secret"
            )
    return tuple(keys)
