"""Many replicas behind Ray Serve. ``serve run mor.server.ray:app`` needs the extra ``ray``."""

from __future__ import annotations

from typing import Any

from mor.errors import missing_package


def app(args: dict[str, Any]) -> Any:
    """The application for ``serve run mor.server.ray:app model=DIR replicas=2`` and for KubeRay.

    Args:
        args: see :class:`mor.server.ray.settings.Settings`.

    Raises:
        MorError: an argument is unknown or wrong, or Ray is not installed.
    """
    try:
        from mor.server.ray.application import build
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "mor":
            raise
        raise missing_package("mor.server.ray needs", str(error.name), "ray") from None
    return build(args)
