"""The deployments of Ray Serve: engines, and a front where Serve's own proxy is the door."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from mor.server.build import Served
from mor.server.middleware import Guard
from mor.server.ray.backend import NoReplica, ReplicaLost, TooMany
from mor.server.ray.calls import Call, Taken
from mor.server.ray.counts import Count, Share
from mor.server.ray.front import Front
from mor.server.ray.links import Batch, Open
from mor.server.ray.replica import Replica, load_app

ENGINE = "engine"
TELL_SECONDS = 5.0
LINKS = 16  # calls of fronts that are no requests


class EngineReplica(Replica):
    """A replica that Ray Serve starts, asks for its health and starts again."""

    def __init__(self, served: Served, threads: int, expected: str) -> None:
        name = serve.get_replica_context().replica_tag
        super().__init__(load_app(served, threads, expected, name), name)
        gc.freeze()  # as in `mor.cli.serve`

    async def answer(self, call: Call) -> AsyncIterator[Taken | list[Message]]:
        """See :meth:`Replica.answer`; Ray Serve looks for a generator in the class itself."""
        async for item in super().answer(call):
            yield item

    async def link(self, asked: Open) -> AsyncIterator[Batch]:
        """See :meth:`Replica.link`."""
        async for batch in super().link(asked):
            yield batch


class ServeStreams:
    """Replicas behind a handle of Ray Serve; see :class:`mor.server.ray.linked.Streams`.

    Args:
        handle: of the engines' deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        self._answer = handle.options(method_name="answer", stream=True)
        self._link = handle.options(method_name="link", stream=True)

    def ask(self, call: Call) -> AsyncGenerator[Taken | list[Message], None]:
        """See :class:`mor.server.ray.linked.Streams`."""
        return self._run(self._answer, call)

    def open(self, asked: Open) -> AsyncGenerator[Batch, None]:
        """See :class:`mor.server.ray.linked.Streams`."""
        return self._run(self._link, asked)

    async def _run(self, method: DeploymentHandle, asked: Call | Open) -> AsyncGenerator[Any, None]:
        """What a replica gives, with Ray's errors as ours."""
        response = method.remote(asked)
        over = False
        try:
            async for item in response:
                yield item
            over = True
        except RayTaskError:  # a mistake of ours in the replica, not the replica's death
            over = True
            raise
        except (BackPressureError, DeploymentUnavailableError) as error:
            over = True
            raise (TooMany if isinstance(error, BackPressureError) else NoReplica) from error
        except Exception as error:  # of Ray, or of gRPC below it: a replica out of reach
            over = True
            raise ReplicaLost(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        finally:
            if not over:
                response.cancel()

    async def tell(self) -> list[dict[str, Any]]:
        """See :class:`mor.server.ray.backend.Backend`."""
        try:
            asked = self.handle.broadcast("tell")
            told = await asked.results_async(timeout_s=TELL_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [one for one in told if isinstance(one, dict)]


def guard(front: Front, served: Served) -> ASGIApp:
    """What stands before a front: keys, the bound on bodies, other origins."""
    from starlette.middleware.cors import CORSMiddleware

    from mor.server.crossing import CORS

    guarded: ASGIApp = Guard(front, served.api_keys, served.max_body, front.totals)
    if served.cors_origins:
        guarded = CORSMiddleware(guarded, allow_origins=list(served.cors_origins), **CORS)
    return guarded


def engines(served: Served, count: Count, share: Share, expected: str, drain: float) -> Any:
    """The application of Ray Serve that has the engines, one per replica.

    Args:
        served: as the front has it.
        count: of replicas.
        share: what each gets.
        expected: the model's fingerprint.
        drain: seconds that a replica has to finish when it is taken away.
    """
    most = (served.options.get("max_residents") or 2 * served.options.get("max_num_seqs", 32)) + (
        served.max_waiting
    )
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": share.cores, "num_gpus": share.gpus},
        "max_ongoing_requests": most + LINKS,
        "max_queued_requests": max(1, served.max_waiting),
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": drain,
        "request_router_config": RequestRouterConfig(
            request_router_class="mor.server.ray.router:PrefixRouter"
        ),
    }
    if count.fixed:
        options["num_replicas"] = count.most
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=count.least,
            initial_replicas=count.start,
            max_replicas=count.most,
            # Requests of one pass, and the front's link.
            target_ongoing_requests=served.options.get("max_num_seqs", 32) + 1,
            upscale_delay_s=count.up,
            downscale_delay_s=count.down,
        )
    deployment = serve.deployment(name=ENGINE, **options)(EngineReplica)
    return deployment.bind(served, share.cores, expected)
