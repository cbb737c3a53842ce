"""Images of several requests put together into batches of a model. No JAX, no HTTP."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np


class Full(Exception):
    """There is no room for more images now."""


class Room:
    """The images that may be in work at a time; who comes beyond them is turned away at once.

    Attributes:
        taken: how many there are.
    """

    def __init__(self, most: int):
        self._most = most
        self.taken = 0

    @contextlib.contextmanager
    def hold(self, count: int) -> Generator[None]:
        """Holds a place for so many images.

        Raises:
            Full: there are not so many left.
        """
        if self.taken + count > self._most:
            raise Full
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


class _Waiting(NamedTuple):
    image: np.ndarray
    since: float
    answer: "asyncio.Future[np.ndarray]"


class Batcher:
    """Runs a model on images that come one by one, several at a time.

    A batch begins when the model is free and an image waits. It takes what waits by then, and is
    run when it is full, or when its first image has waited for `max_delay`. The model runs in one
    thread of its own, beside which the others go on.

    Args:
        predict: maps [batch, height, width, channels] to [batch, ...]. It is called in one thread.
        max_batch: the images of a batch, at most.
        max_delay: seconds.
        ran: is called after each batch with its size and the seconds that it took.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray], np.ndarray],
        *,
        max_batch: int,
        max_delay: float,
        ran: Callable[[int, float], None] = lambda *_: None,
    ):
        self._predict = predict
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._ran = ran
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._running: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self):
        """Has batches run within; what still waits at the end is never answered."""
        self._running = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._thread.shutdown()

    @property
    def is_running(self) -> bool:
        """Tells whether an image that comes now will be answered."""
        return self._running is not None and not self._running.done()

    async def submit(self, image: np.ndarray) -> np.ndarray:
        """The model's row of an image [height, width, channels]; cancelled, it is not run.

        Raises:
            Exception: whatever the model raised for its batch.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(image, time.monotonic(), answer))
        self._arrived.set()
        return await answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            try:
                rows = await loop.run_in_executor(self._thread, self._call, batch)
            except Exception as error:
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            for each, row in zip(batch, rows, strict=True):
                if not each.answer.done():
                    each.answer.set_result(row)

    async def _gather(self) -> list[_Waiting]:
        """The next batch, of one image at least."""
        batch: list[_Waiting] = []
        while not batch:
            await self._until(lambda: bool(self._waiting))
            left = self._waiting[0].since + self._max_delay - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left, 0)):
                    await self._until(lambda: len(self._waiting) >= self._max_batch)
            while self._waiting and len(batch) < self._max_batch:
                each = self._waiting.popleft()
                if not each.answer.done():  # Nobody waits for one that has been cancelled.
                    batch.append(each)
        return batch

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._arrived.clear()
            await self._arrived.wait()

    def _call(self, batch: list[_Waiting]) -> np.ndarray:
        start = time.monotonic()
        rows = self._predict(np.stack([each.image for each in batch]))
        self._ran(len(batch), time.monotonic() - start)
        return rows
