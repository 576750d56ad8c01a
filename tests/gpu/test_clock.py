"""The clock on a real stream: a starving device is seen though the host never waits."""

import pytest
import torch

from trainer.monitor.clock import Clock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SLEEP = 20_000_000  # cycles: some 12 ms


def rates(wait, work, steps=10):
    """Of steps whose batch takes `wait` SLEEPs on a stream of its own, begun as the one before ends."""
    clock, producer = Clock(torch.device("cuda", 0)), torch.cuda.Stream()

    def batches():
        while True:
            consumer = torch.cuda.current_stream()
            producer.wait_stream(consumer)
            with torch.cuda.stream(producer):
                torch.cuda._sleep(wait * SLEEP + 1)
            consumer.wait_stream(producer)
            yield None

    loader = batches()
    try:
        for _ in range(steps):
            torch.cuda.set_sync_debug_mode("error")
            clock.next_of(loader)
            torch.cuda._sleep(work * SLEEP)
            clock.step(100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return clock.rates


def test_a_starving_device_is_seen():
    rates(0, 1)
    assert rates(0, 1)["data_wait"] < 0.1
    assert 0.4 < rates(1, 1)["data_wait"] < 0.6
    assert 0.65 < rates(3, 1)["data_wait"] < 0.85


def test_the_rate_is_that_of_the_device():
    slow, fast = rates(0, 4), rates(0, 1)
    assert 3 < fast["images_per_second"] / slow["images_per_second"] < 5
