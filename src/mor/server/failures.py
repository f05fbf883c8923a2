"""What becomes of a failed engine, and what clients get when nothing can be done for them."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Mapping

from mor.engine import Engine
from mor.server.errors import ApiError

log = logging.getLogger("mor.server")

WINDOW = 60.0
"""Seconds within which restarts are counted."""


def shutting_down(headers: Mapping[str, str] | None = None) -> ApiError:
    """The server takes no more."""
    return ApiError(503, "The server is shutting down", code="shutting_down", headers=headers)


def not_ready() -> ApiError:
    """The engine went down after the request had come."""
    return ApiError(503, "The server takes no requests", code="not_ready")


def overloaded(under_way: int, most: int) -> ApiError:
    """Too many completions at a time."""
    message = f"{under_way} completions are under way, and {most} is the most; try again soon"
    return ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})


def engine_failed(why: str, status: int = 503) -> ApiError:
    """The engine is down for good."""
    return ApiError(status, f"The engine failed: {why}", code="engine_failed")


def engine_restarted(why: str) -> ApiError:
    """What was under way is lost, and may be sent again."""
    message = f"The engine failed ({why}) and was started again; send the request again"
    return ApiError(503, message, code="engine_restarted", headers={"Retry-After": "1"})


class Restarts:
    """Starts an engine again; not too often, so that a broken model does not fail forever.

    Args:
        most: restarts within ``window`` seconds; 0 for none at all.
        window: seconds.
    """

    def __init__(self, most: int, window: float = WINDOW) -> None:
        self.most, self.window = most, window
        self._times: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether one more is allowed at ``now`` (seconds); it is counted then."""
        while self._times and now - self._times[0] >= self.window:
            self._times.popleft()
        if len(self._times) >= self.most:
            return False
        self._times.append(now)
        return True

    def start(self, engine: Engine, error: BaseException) -> bool:
        """Start ``engine`` again after ``error``, where that is allowed; whether it works now."""
        if not self.take(time.monotonic()):
            return False
        traceback.clear_frames(error.__traceback__)  # they hold pages, and new ones are wanted
        try:
            engine.restart()
        except Exception:
            log.exception("the engine could not be started again")
            return False
        return True
