"""``mor serve --replicas``: a Ray of its own on this machine, engines in it, the front here."""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import replace

import ray
from ray import serve

from mor.errors import MorError
from mor.run_files import find_folder
from mor.server.build import Served
from mor.server.ray.counts import Count, count_cores, count_gpus, share_memory, share_out
from mor.server.ray.deploy import ServeStreams, engines, guard
from mor.server.ray.fingerprint import fingerprint
from mor.server.ray.front import Front
from mor.server.ray.linked import LinkedBackend
from mor.server.ray.totals import Totals
from mor.server.serve import make_server, serve_on
from mor.server.sockets import open_sockets

log = logging.getLogger("uvicorn.error")
APP = "mor"
STARTS = 4  # of Ray: its processes have 15 seconds to begin, which a busy machine may not give


def run_replicas(
    served: Served,
    count: Count,
    host: str,
    port: int,
    *,
    drain_seconds: float = 30.0,
    log_level: str = "info",
) -> None:
    """Serve until a signal comes.

    Args:
        served: the model, and how it is served.
        count: of replicas.
        host, port: of the front.
        drain_seconds: to finish after SIGTERM.
        log_level: of uvicorn.

    Raises:
        MorError: more replicas than cores or GPUs, a port in use, a replica that cannot start.
    """
    share = share_out(count, count_cores(), count_gpus())
    served = replace(served, model=find_folder(served.model).resolve())  # replicas live elsewhere
    served.check()
    expected = fingerprint(served.model)
    sockets = open_sockets(host, port)
    try:
        _start_ray(count, share.cores, share.gpus)
        inner = replace(served.of_a_replica(), options=share_memory(served.options, count))
        app = engines(inner, count, share, expected, drain_seconds)
        try:
            handle = serve.run(app, name=APP, route_prefix=None)
        except Exception as error:
            raise explain_start(error, _messages()) from None
        front = Front(LinkedBackend(ServeStreams(handle)), Totals(served.name))
        server = make_server(
            guard(front, served), host, port, loop=front, drain_seconds=drain_seconds,
            log_level=log_level,
        )  # fmt: skip
        serve_on(server, sockets, host, port)
    finally:
        for one in sockets:
            one.close()
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def _start_ray(count: Count, cores: int, gpus: int) -> None:
    """A Ray for this process alone, with places for the replicas and nothing else.

    Raises:
        MorError: it does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A replica imports what this process would, from the same places.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for attempt in range(STARTS):
        try:
            ray.init(
                address="local",
                num_cpus=count.most * cores,
                num_gpus=count.most * gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
            return
        except Exception as error:  # whatever keeps its processes from starting
            ray.shutdown()
            if attempt == STARTS - 1:
                raise MorError(f"Ray did not start: {_first_line(str(error))}") from None


def _messages() -> str:
    """What Ray Serve has to say about the deployments."""
    try:
        applications = serve.status().applications.values()
        return "\n".join(d.message for one in applications for d in one.deployments.values())
    except Exception:
        return ""


def explain_start(error: Exception, told: str) -> MorError:
    """Why no replica could start, in one sentence.

    Args:
        error: of Ray Serve, with the traceback of a replica in its text.
        told: what Serve's status says besides.
    """
    text = f"{error}\n{told}"
    ours = re.findall(r"MorError: (.+)", text)
    if ours:
        return MorError(ours[-1].strip())
    causes = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .+", text, re.MULTILINE)
    return MorError(f"no replica could start: {_first_line(causes[-1] if causes else text)}")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "it gives no reason"
