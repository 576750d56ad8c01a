"""Rates and waiting for data, on a CPU and on a stream that this test plays."""

import itertools
import time

import pytest
import torch

from trainer.monitor.clock import Clock


class Stream:
    """A device that works off what is enqueued, in order; the host's time is its own. Times in ms."""

    def __init__(self):
        self.host = self.done = 0.0  # host: now; done: when the device has done all that is enqueued
        self.synchronized = 0

    def work(self, duration):
        self.done = max(self.done, self.host) + duration

    def wait_until(self, ready):
        self.done = max(self.done, self.host, ready)

    def event(self, enable_timing=False):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.at = stream, None

    def record(self):
        self.at = max(self.stream.done, self.stream.host)

    def synchronize(self):
        self.stream.synchronized += 1
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, end):
        assert self.stream.host >= end.at, "read before the device was there"
        return end.at - self.at


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    return stream


def run(stream, steps, ready, step=10.0, host=1.0):
    """Steps of `step` ms on the device, `host` ms to enqueue each; batch i is ready at ready(i)."""
    clock = Clock(torch.device("cuda"))

    def batches():
        for i in itertools.count():
            stream.wait_until(ready(i))
            yield i

    loader = batches()
    for _ in range(steps):
        clock.next_of(loader)
        stream.host += host
        stream.work(step)
        clock.step(100)
    assert stream.synchronized == 0, "a step waited for the device"
    return clock.rates


def test_a_device_that_always_finds_its_batch_waits_for_none(stream):
    rates = run(stream, 11, lambda i: 0.0)
    assert rates["data_wait"] == 0
    assert rates["images_per_second"] == pytest.approx(100 / 0.010)  # not the 1 ms that the host takes


def test_a_starving_device_waits_though_the_host_does_not(stream):
    rates = run(stream, 11, lambda i: 25.0 * i)
    assert stream.synchronized == 1
    assert rates["images_per_second"] == pytest.approx(100 / 0.025, rel=0.01)
    assert rates["data_wait"] == pytest.approx(15 / 25, rel=0.01)


def test_a_loader_that_holds_the_host_up_counts_too(stream):
    """The batch is made in next(): the host comes late, and the device stands still until then."""

    def ready(i):
        stream.host += 30.0
        return 0.0

    rates = run(stream, 11, ready)
    # the device begins a step 1 ms after next() returned and works for 10, the host goes on meanwhile
    assert rates["images_per_second"] == pytest.approx(100 / 0.031, rel=0.1)
    assert rates["data_wait"] == pytest.approx(20 / 31, rel=0.1)


def test_rates_are_read_more_than_once(stream):
    clock = Clock(torch.device("cuda"))
    clock.step(100)
    for i in range(1, 4):
        clock.next_of(iter([stream.wait_until(20.0 * i)]))
        stream.work(5.0)
        clock.step(100)
        assert clock.rates["images_per_second"] == pytest.approx(100 * i / (0.020 * i + 0.005))
    clock.restart()
    stream.work(5.0)
    assert clock.rates == {"images_per_second": 0, "data_wait": 0}


def test_on_a_cpu_the_time_in_the_loader_counts():
    clock = Clock(torch.device("cpu"))
    clock.step(1)  # the first is left out

    def slow():
        while True:
            time.sleep(0.02)
            yield None

    loader = slow()
    for _ in range(3):
        clock.next_of(loader)
        clock.step(8)
    rates = clock.rates
    assert 0.5 < rates["data_wait"] <= 1
    assert 0 < rates["images_per_second"] <= 8 / 0.02
