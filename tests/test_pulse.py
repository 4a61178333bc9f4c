"""Signs of life: who gives none is lost, who is slow is not, and nothing waits for ever."""

import threading
import time

import pytest

from lorikit.train import pulse
from lorikit.train.pulse import Pulse


class Memory:
    """A store in this process. Machine 1 counts as long as `counts`; it answers as long as `answers`."""

    def __init__(self):
        self.values, self.counts, self.answers = {}, True, threading.Event()
        self.answers.set()

    def set(self, key, value):
        self.values[key] = value.encode()

    def multi_get(self, keys):
        self.answers.wait(20)
        if self.counts:
            self.values["pulse/1"] = str(time.monotonic()).encode()
        return [self.values[key] for key in keys]


@pytest.fixture
def quick(monkeypatch):
    """A hundred times as fast; what would have ended the process is noted."""
    codes = []
    for name in ("PERIOD", "SILENCE", "_GRACE"):
        monkeypatch.setattr(pulse, name, getattr(pulse, name) / 100)
    monkeypatch.setattr(pulse.os, "_exit", codes.append)
    return codes


@pytest.fixture
def store():
    return Memory()


@pytest.fixture
def watched(quick, store):
    watched = Pulse(lambda: store, 0, 2, speaks=True)
    watched.start()
    yield watched
    watched.stop()
    store.answers.set()


def until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_machines_that_count_are_there(watched, store, quick):
    time.sleep(5 * pulse.SILENCE)
    assert watched.lost == "" and quick == []
    assert int(store.values["pulse/0"]) > 5, "this one gave its signs"


def test_a_machine_that_stops_counting_is_lost_and_the_process_lives_where_somebody_takes_it(watched, store, quick):
    time.sleep(0.2)
    store.counts = False
    until(lambda: watched.take())
    assert watched.lost.startswith("machine 1 gave no sign of life")
    time.sleep(3 * pulse._GRACE)
    assert quick == []


def test_a_store_that_gives_no_answer_ends_the_process_where_nobody_looks(watched, store, quick, capfd):
    time.sleep(0.2)
    store.answers.clear()
    until(lambda: quick)
    assert quick[0] == 75
    assert watched.lost.startswith("the run's store gave no answer")
    assert "the same command goes on from the newest checkpoint" in capfd.readouterr().err


def test_time_in_which_this_process_was_held_up_does_not_count():
    watched = Pulse(Memory, 0, 2, speaks=True)
    now = time.monotonic()
    assert watched._silent(now + 3600, since=now + 3590) == ""
    assert watched._silent(now + 3600, since=now) != ""
