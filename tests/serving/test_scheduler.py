"""The order of scoring, with scores that are the texts' own numbers and a gate in place of time."""

import logging
import threading
import time

import pytest

from modeling_querit.pair_encoding_querit import EncodedPair
from modeling_querit.serving.jobs import Job, Options
from modeling_querit.serving.metrics import Metrics
from modeling_querit.serving.scheduler import QueueFullError, Scheduler

NO_OPTIONS = Options()


def make_job(name, lengths, options=NO_OPTIONS):
    pairs = [(name, str(index)) for index in range(len(lengths))]
    encoded = [EncodedPair([hash(name) % 997, *[index] * (length - 1)]) for index, length in enumerate(lengths)]
    return Job(pairs, options, encoded, [None] * len(lengths))


class Scoring:
    """Scores texts by their number, one step for each `release`; a step waits until then."""

    def __init__(self):
        self.steps = []
        self._permits = threading.Semaphore(0)

    def __call__(self, pairs, options):
        self._permits.acquire()
        self.steps.append([query for query, _ in pairs])
        if "poison" in self.steps[-1]:
            raise ValueError("text of a document")
        return [float(document) for _, document in pairs]

    def release(self, steps):
        self._permits.release(steps)


@pytest.fixture
def scoring():
    return Scoring()


@pytest.fixture
def scheduler(scoring):
    scheduler = Scheduler(scoring, batch_tokens=100, max_queue=50, metrics=Metrics())
    scheduler.start()
    yield scheduler
    scoring.release(1000)
    scheduler.close()


def submit(scheduler, *jobs):
    for job in jobs:
        scheduler.submit(job)
    return [job.future for job in jobs]


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def busy(scheduler):
    """A first step that holds the thread until it is released."""
    job = make_job("first", [10])
    scheduler.submit(job)
    until(lambda: not scheduler.waiting_pairs())
    return job.future


def test_jobs_that_arrive_together_are_scored_together(scheduler, scoring):
    busy(scheduler)
    futures = submit(scheduler, *(make_job(name, [20, 20]) for name in ("a", "b")))
    scoring.release(2)
    assert [future.result(10) for future in futures] == [[0.0, 1.0]] * 2
    assert scoring.steps == [["first"], ["a", "a", "b", "b"]]


def test_a_short_job_overtakes_a_long_one_and_is_answered_first(scheduler, scoring):
    busy(scheduler)
    (long,) = submit(scheduler, make_job("long", [50] * 10))
    scoring.release(2)
    until(lambda: len(scoring.steps) == 2)
    (short,) = submit(scheduler, make_job("short", [50]))
    scoring.release(2)
    assert short.result(10) == [0.0]
    assert not long.done()
    scoring.release(10)
    assert long.result(10) == [float(index) for index in range(10)]


def test_a_long_job_is_not_starved(scheduler, scoring):
    busy(scheduler)
    (long,) = submit(scheduler, make_job("long", [50] * 4))
    waited = 0
    scoring.release(1)
    while not long.done():
        # Another short one arrives with every step.
        submit(scheduler, make_job("short", [90]))
        steps = len(scoring.steps)
        scoring.release(1)
        until(lambda steps=steps: len(scoring.steps) > steps)
        waited += 1
        assert waited < 20
    # 4 x 200 tokens of others' work, 90 in a step, and its own four pairs.
    assert waited >= 3


def test_options_are_not_mixed(scheduler, scoring):
    busy(scheduler)
    futures = submit(scheduler, make_job("a", [10]), make_job("b", [10], Options("Find a novel.")), make_job("c", [10]))
    scoring.release(3)
    assert [future.result(10) for future in futures] == [[0.0]] * 3
    assert scoring.steps[1:] == [["a", "c"], ["b"]]


def test_a_pair_over_the_budget_is_scored_by_itself(scheduler, scoring):
    busy(scheduler)
    futures = submit(scheduler, make_job("huge", [500, 20]), make_job("a", [20]))
    scoring.release(5)
    assert [future.result(10) for future in futures] == [[0.0, 1.0], [0.0]]
    assert ["huge"] in scoring.steps


def test_who_is_gone_is_not_scored_for(scheduler, scoring):
    busy(scheduler)
    gone, stays = submit(scheduler, make_job("gone", [10]), make_job("stays", [10]))
    gone.cancel()
    assert scheduler.waiting_pairs() == 1
    scoring.release(2)
    assert stays.result(10) == [0.0]
    assert scoring.steps == [["first"], ["stays"]]


def test_one_job_cannot_spoil_the_others(scheduler, scoring, caplog):
    busy(scheduler)
    poison, fine = submit(scheduler, make_job("poison", [10]), make_job("fine", [10]))
    with caplog.at_level(logging.ERROR):
        scoring.release(10)
        assert fine.result(10) == [0.0]
        with pytest.raises(ValueError, match="text of a document"):
            poison.result(10)
    assert "Scoring failed: ValueError" in caplog.text
    assert "text of a document" not in caplog.text


def test_a_full_queue_refuses_but_an_empty_one_takes_any_job(scheduler, scoring):
    busy(scheduler)
    with scheduler.room(60):
        (large,) = submit(scheduler, make_job("large", [10] * 60))
    with pytest.raises(QueueFullError) as error, scheduler.room(1):
        pass
    assert error.value.seconds > 0
    scoring.release(100)
    assert len(large.result(10)) == 60


def test_room_is_given_back(scheduler):
    with scheduler.room(50), pytest.raises(QueueFullError), scheduler.room(1):
        pass
    assert scheduler.waiting_pairs() == 0


def test_closing_scores_what_is_left(scoring):
    scheduler = Scheduler(scoring, 100, 50, Metrics())
    scheduler.start()
    (future,) = submit(scheduler, make_job("a", [60, 60, 60]))
    scoring.release(10)
    scheduler.close()
    assert future.result(0) == [0.0, 1.0, 2.0]
    assert not scheduler.is_running
    with pytest.raises(RuntimeError, match="does not run"):
        scheduler.submit(make_job("late", [10]))
