"""The engine in a thread of its own: commands in through a queue, tokens out to asyncio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mor.engine import Engine
from mor.errors import MorError
from mor.server import failures
from mor.server.errors import ApiError, explain_grammar, explain_refusal
from mor.server.jobs import Job, Update
from mor.server.metrics import ServerMetrics

log = logging.getLogger("mor.server")

_Command = Callable[[], None]


class EngineLoop:
    """Steps an engine for as long as there is work.

    Methods are called from asyncio's thread unless they say otherwise; none of them waits for a
    tick. At most ``max_residents + max_waiting`` completions are under way at a time.

    Args:
        engine: from now on it belongs to this loop's thread.
        max_waiting: completions that may wait for a place.
        metrics: counts what happens.
        max_restarts: how often within a minute the engine is started again after a failed tick.
    """

    def __init__(
        self, engine: Engine, max_waiting: int, metrics: ServerMetrics, max_restarts: int = 0
    ) -> None:
        self.restarts = failures.Restarts(max_restarts)
        self.engine, self.metrics = engine, metrics
        self.most = engine.max_residents + max_waiting
        self.failure: str | None = None
        self.draining = False
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._jobs: dict[str, tuple[Job, int]] = {}  # by the engine's name of a prompt
        self._running: dict[Job, None] = {}
        self._lock = threading.Lock()
        self._under_way = 0  # completions, from `submit` to their end
        self._numbers = itertools.count()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)

    # From asyncio --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; updates go to the running asyncio loop."""
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Abort what is under way and end the thread. Any thread may call it."""

        def last() -> None:
            self._drop_all(failures.shutting_down())
            self._stopped = True

        self._commands.put(last)
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def asyncio_loop(self) -> asyncio.AbstractEventLoop | None:
        """To whom updates go; None before the start."""
        return self._asyncio

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, but for the load."""
        return self.failure is None and not self.draining and self._thread.is_alive()

    @property
    def under_way(self) -> int:
        """Completions from :meth:`submit` to their end."""
        return self._under_way

    def reserve(self, prompts: int, n: int) -> int:
        """Take places for the completions of a request, before any work is done for it.

        They are given back when its job is over, or by :meth:`release` where it never comes to one.

        Returns:
            How many.

        Raises:
            ApiError: 503 while draining or after a failure, 429 where too much is under way, 400
                for more completions than could ever be.
        """
        count = prompts * n
        if count > self.most:
            raise ApiError(
                400,
                f"{prompts} prompts with n={n} are {count} completions; at most {self.most} can "
                "be under way at a time",
                param="n",
                code="invalid_value",
            )
        if self.failure is not None:
            raise failures.engine_failed(self.failure)
        if not self.ready:
            raise failures.shutting_down({"Retry-After": "5"})
        with self._lock:
            if self._under_way + count > self.most:
                self.metrics.rejected.inc()
                raise failures.overloaded(self._under_way, self.most)
            self._under_way += count
        return count

    def release(self, count: int) -> None:
        """Give places back. Any thread may call it."""
        with self._lock:
            self._under_way -= count

    def submit(self, job: Job) -> None:
        """Hand a job to the engine; then ``await job.accepted()``. Its places are reserved."""
        self._commands.put(lambda: self._add(job))

    def abort(self, job: Job) -> None:
        """Give a job up; its pages are free after the tick that runs now. Harmless when it is over.

        Any thread may call it.
        """
        self._commands.put(lambda: self._drop(job, None))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run ``function(engine)`` between two ticks.

        Raises:
            ApiError: the thread has ended.
        """
        if not self._thread.is_alive():
            raise ApiError(503, "The engine has ended", code="not_ready")
        answer: Future[Any] = Future()

        def ask() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                answer.set_result(function(self.engine))
            except BaseException as error:
                answer.set_exception(error)

        self._commands.put(ask)
        return await asyncio.wrap_future(answer)

    async def drain(self, seconds: float) -> None:
        """Take no more, let what is under way finish for so long, then abort it."""
        self.draining = True
        end = time.monotonic() + seconds
        while self._under_way and time.monotonic() < end and self.failure is None:
            await asyncio.sleep(0.02)
        await self.call(lambda engine: self._drop_all(failures.shutting_down()))

    # In the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped:
            command = self._next(wait=not self._working)
            try:
                while command is not None:
                    command()
                    command = self._next(wait=False)
                if self._working:
                    self._tick()
            except Exception as error:
                self._fail(error)

    @property
    def _working(self) -> bool:
        return self.failure is None and self.engine.unfinished > 0 and not self._stopped

    def _next(self, wait: bool) -> _Command | None:
        try:
            return self._commands.get(block=wait)
        except queue.Empty:
            return None

    def _fail(self, error: BaseException) -> None:
        """What the tick had half done is not known: nothing under way can be trusted."""
        log.error("a tick failed", exc_info=error)
        why = f"{type(error).__name__}: {error}"[:300]
        if self.restarts.start(self.engine, error):
            self.metrics.restarts.inc()
            self._drop_all(failures.engine_restarted(why))
            return
        log.error("the server is not ready any more")
        self.failure = why
        self._drop_all(failures.engine_failed(why, 500))

    def _tick(self) -> None:
        updates: list[tuple[Job, Update | ApiError | None]] = []
        for output in self.engine.step():
            if output.request_id not in self._jobs:
                continue  # of a job that was dropped just now
            job, first = self._jobs[output.request_id]
            if any(done.finish_reason == "error" for done in output.completions):
                self._drop(job, explain_grammar())
                continue
            for update, done in job.take(first, output):
                updates.append((job, update))
                if update.finish_reason is not None:
                    self.release(1)
                    self.metrics.finished(done)
            if output.finished:
                del self._jobs[output.request_id]
            if not job.left:
                self._running.pop(job, None)
        self._hand_over(updates)

    def _add(self, job: Job) -> None:
        if self.failure is not None or self._stopped:
            self.release(job.left)
            self._hand_over([(job, failures.not_ready())])
            return
        self._running[job] = None
        try:
            for place, prompt in enumerate(job.prompts):
                name = f"{job.name}-{next(self._numbers)}"
                self.engine.add_request(prompt, job.params_of(prompt), name)
                self._jobs[name] = (job, place * job.params.n)
                self.metrics.prompt_tokens.inc(len(prompt))
        except MorError as error:
            self._drop(job, explain_refusal(error))
        except Exception:
            log.exception("a request could not be added")
            self._drop(job, ApiError(500, "The request could not be added", code="engine_error"))
        else:
            self._hand_over([(job, None)])

    def _drop(self, job: Job, error: ApiError | None) -> None:
        """Take a job out of the engine, and say why where somebody listens."""
        if job not in self._running:
            return
        del self._running[job]
        for name in [name for name, (other, _) in self._jobs.items() if other is job]:
            del self._jobs[name]
            try:
                self.engine.abort(name)
            except Exception:  # after a failed tick anything may be broken
                log.exception("request %s could not be aborted", name)
        self.metrics.aborted.inc(job.left)
        self.release(job.left)
        job.left = 0
        if error is not None:
            self._hand_over([(job, error)])

    def _drop_all(self, error: ApiError) -> None:
        for job in list(self._running):
            self._drop(job, error)

    def _hand_over(self, updates: list[tuple[Job, Update | ApiError | None]]) -> None:
        if not updates or self._asyncio is None:
            return

        def deliver() -> None:
            for job, item in updates:
                job.inbox.put_nowait(item)

        try:
            self._asyncio.call_soon_threadsafe(deliver)
        except RuntimeError:  # asyncio's loop has ended: nobody listens any more
            log.debug("updates after the end of the event loop")
