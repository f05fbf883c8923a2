"""The application behind Serve's own proxy: a front deployment before the engines."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from mor.server.build import Served
from mor.server.ray.deploy import ServeStreams, engines, guard
from mor.server.ray.fingerprint import fingerprint
from mor.server.ray.front import Front
from mor.server.ray.linked import LinkedBackend
from mor.server.ray.settings import read_settings
from mor.server.ray.totals import Totals


@serve.ingress()
class ServeFront:
    """The front as a deployment: Serve's proxy is before it, the engines behind it.

    Args:
        handle: of the engines.
        served: the model, and how it is served.
    """

    def __init__(self, handle: DeploymentHandle, served: Served) -> None:
        self.front = Front(LinkedBackend(ServeStreams(handle)), Totals(served.name))
        self.served = served

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray Serve asks for the ASGI application once the deployment is there."""
        return guard(self.front, self.served)


def build(args: dict[str, Any]) -> Any:
    """The application for these arguments.

    Raises:
        MorError: an argument is unknown or wrong, or the model cannot be served like that.
    """
    settings = read_settings(args)
    served, count = settings.served(), settings.count()
    if settings.fingerprint is None:
        served.check()
    expected = settings.fingerprint or fingerprint(served.model)
    engine = engines(
        served.of_a_replica(), count, settings.share(), expected, settings.drain_seconds
    )
    most = count.most * (served.max_waiting + 2 * settings.max_num_seqs)
    front = serve.deployment(
        name="front",
        num_replicas=settings.fronts,
        max_ongoing_requests=max(100, most),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},
    )(ServeFront)
    return front.bind(engine, served)
