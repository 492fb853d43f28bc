"""An engine for an event loop: many requests at once, each an asynchronous stream of its own."""

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ...model.loading import Model
from ..prompts import Prompt
from ..request import StreamChunk
from ..sampling.params import SamplingParams
from .engine import Engine
from .stats import EngineStats


class AsyncEngine:
    """Serves streams from one event loop, while a thread of its own steps an `Engine`.

    Used as an asynchronous context manager; leaving it aborts what is left and frees the engine's memory.

    Args:
      model: as `load_model` returns it.
      options: as of `Engine`.
    """

    def __init__(self, model: Model, **options: Any):
        self.engine = Engine(model, **options)
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._streams: dict[int, asyncio.Queue[StreamChunk | BaseException]] = {}
        self._thread = threading.Thread(target=self._serve, name="ridgeline-engine", daemon=True)

    async def __aenter__(self) -> "AsyncEngine":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)
        self.engine.close()
        self._fail(RuntimeError("the engine is closed"))

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        """The output of one request as it comes; whoever stops reading has it aborted.

        Arguments and errors as of `Engine.submit`; what fails while it runs is raised.
        """
        chunks: asyncio.Queue[StreamChunk | BaseException] = asyncio.Queue()

        def submit() -> int:
            request = self.engine.submit(prompt, sampling, priority=priority)
            self._streams[request] = chunks
            return request

        request = await self._called(submit)
        try:
            while True:
                chunk = await chunks.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                if chunk.output is not None:
                    chunk.output.raise_for_error()
                yield chunk
                if chunk.output is not None:
                    break
        finally:
            self._calls.put(functools.partial(self._forget, request))

    async def stats(self) -> EngineStats:
        """As `Engine.stats`."""
        return await self._called(self.engine.stats)

    async def warm_up(self) -> None:
        """As `Engine.warm_up`."""
        await self._called(self.engine.warm_up)

    async def _called(self, function: Callable[[], Any]) -> Any:
        """A function's result, called between two steps."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine does not run; use it within `async with`")
        result = self._loop.create_future()

        def call() -> None:
            try:
                value, error = function(), None
            except Exception as e:
                value, error = None, e
            self._tell(_settle, result, value, error)

        self._calls.put(call)
        return await result

    def _forget(self, request: int) -> None:
        self._streams.pop(request, None)
        self.engine.abort(request)

    def _serve(self) -> None:
        """Runs in the thread: calls that came meanwhile, then a step, for as long as there is work; else it waits."""
        while True:
            while not (self._calls.empty() and self.engine.has_work):
                if (call := self._calls.get()) is None:
                    return
                call()
            try:
                chunks = self.engine.step()
            except Exception as error:  # no request's own
                self._fail(error)
                continue
            self._tell(self._deliver, chunks)

    def _deliver(self, chunks: Sequence[StreamChunk]) -> None:
        for chunk in chunks:
            if chunk.index in self._streams:
                self._streams[chunk.index].put_nowait(chunk)

    def _fail(self, error: BaseException) -> None:
        for stream in list(self._streams.values()):
            self._tell(stream.put_nowait, error)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _settle(future: asyncio.Future, value: Any, error: Exception | None) -> None:
    if future.done():  # whoever asked has gone
        return
    future.set_exception(error) if error is not None else future.set_result(value)
