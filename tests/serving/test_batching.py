"""Batches: what waits together runs together, and everybody gets their own row."""

import asyncio
import threading
import time

import numpy as np
import pytest

from vit_jax.serving.batching import Batcher, Full, Room


class Model:
    """Doubles images; the first batch waits at a gate, and sizes are noted."""

    def __init__(self, closed=False):
        self.sizes = []
        self.gate = threading.Event()
        if not closed:
            self.gate.set()

    def __call__(self, images):
        self.sizes.append(len(images))
        assert self.gate.wait(30)
        if (images < 0).any():
            raise RuntimeError("a negative image")
        return images * 2


def image(value):
    return np.full((1, 1, 1), value, np.float32)


def run(model, use, **options):
    async def inside():
        batcher = Batcher(model, **{"max_batch": 4, "max_delay": 0.0, **options})
        async with batcher.running():
            return await use(batcher)

    return asyncio.run(inside())


async def until_busy(model):
    while not model.sizes:
        await asyncio.sleep(0.001)


def test_what_waits_while_the_model_runs_goes_together():
    model = Model(closed=True)

    async def use(batcher):
        first = asyncio.ensure_future(batcher.submit(image(0)))
        await until_busy(model)
        others = [asyncio.ensure_future(batcher.submit(image(i))) for i in range(1, 8)]
        await asyncio.sleep(0)
        model.gate.set()
        return await asyncio.gather(first, *others)

    rows = run(model, use)
    assert model.sizes == [1, 4, 3]
    assert [float(row.item()) for row in rows] == [2.0 * i for i in range(8)]


def test_an_image_waits_for_others_and_no_longer():
    model = Model()

    async def use(batcher):
        start = time.monotonic()
        first = asyncio.ensure_future(batcher.submit(image(1)))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.submit(image(2)))
        return time.monotonic() - start

    seconds = run(model, use, max_delay=0.5)
    assert model.sizes == [2]
    assert seconds >= 0.5


def test_a_full_batch_does_not_wait():
    model = Model()

    async def use(batcher):
        async with asyncio.timeout(20):
            return await asyncio.gather(*(batcher.submit(image(i)) for i in range(8)))

    run(model, use, max_delay=60.0)
    assert model.sizes == [4, 4]


def test_who_has_left_is_not_run():
    model = Model(closed=True)

    async def use(batcher):
        first = asyncio.ensure_future(batcher.submit(image(0)))
        await until_busy(model)
        others = [asyncio.ensure_future(batcher.submit(image(i))) for i in range(1, 5)]
        await asyncio.sleep(0)
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        model.gate.set()
        return await asyncio.gather(first, others[1], others[3])

    rows = run(model, use)
    assert model.sizes == [1, 2]
    assert [float(row.item()) for row in rows] == [0, 4, 8]


def test_an_error_is_of_its_batch_alone():
    model = Model()

    async def use(batcher):
        bad = await asyncio.gather(batcher.submit(image(-1)), return_exceptions=True)
        assert batcher.is_running
        return bad[0], await batcher.submit(image(3))

    error, row = run(model, use)
    assert str(error) == "a negative image" and float(row.item()) == 6


def test_room_is_given_back_and_not_exceeded():
    room = Room(3)
    with room.hold(2):
        with pytest.raises(Full), room.hold(2):
            pass
        with room.hold(1):
            assert room.taken == 3
    assert room.taken == 0
