"""The worker of the studio: one thing at a time, the newest wish of a page wins, and everyone sees how long the queue is."""

import threading
import time

import pytest
import torch

from multibeta.studio import worker
from multibeta.studio.worker import Superseded, Waiting, Worker


@pytest.fixture
def one(monkeypatch):
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.01)
    made = Worker()
    yield made
    made.close()


def walk(steps, each=lambda step: time.sleep(0.005)):
    """A work of several evaluations that gives how many were done."""

    def work(callback):
        for step in range(steps):
            each(step)
            callback(step + 1, steps, torch.zeros(1))
        return ("done", steps)

    return work


def answer(wish, work):
    """All that a wish yields, in a thread of its own; what it raised in the place of its last."""
    said = []

    def listen():
        try:
            said.extend(wish.run(work))
        except Exception as error:
            said.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    return said, thread


def test_a_wish_gives_what_its_work_gives_and_tells_how_far_it_is(one):
    *words, last = one.wish("page").run(walk(10))
    assert last == ("done", 10) and all(isinstance(word, Waiting) for word in words)
    done = [word.done for word in words]
    assert done == sorted(done) and {word.before for word in words} == {0} and max(word.total for word in words) == 10


def test_what_can_be_shown_early_is_shown_once(one):
    wish = one.wish("page")

    def work(callback):
        wish.show("decoded")
        return walk(20)(callback)

    *words, last = wish.run(work)
    assert last == ("done", 20) and [word.early for word in words].count("decoded") == 1
    assert {word.early for word in words} == {"decoded", None}


def test_the_newest_wish_of_a_page_ends_the_older_ones(one):
    begun, steps = threading.Event(), []

    def each(step):
        steps.append(step)
        begun.set()
        time.sleep(0.005)

    running, first = answer(one.wish("page"), walk(1000, each))
    begun.wait()
    queued, second = answer(one.wish("page"), walk(1000))
    assert list(one.wish("page").run(walk(1)))[-1] == ("done", 1)
    first.join()
    second.join()
    assert isinstance(running[-1], Superseded) and isinstance(queued[-1], Superseded)
    assert len(steps) < 200, "the walk went on though nobody waited for it"


def test_pages_wait_for_each_other_in_turn_and_know_how_many_come_before(one):
    gate, begun, order = threading.Event(), threading.Event(), []

    def work_of(name):
        def work(callback):
            begun.set()
            gate.wait()
            order.append(name)
            return (name,)

        return work

    answers = []
    for number, name in enumerate("abc"):
        answers.append(answer(one.wish(name), work_of(name)))
        begun.wait()
        while not any(isinstance(word, Waiting) and word.before == number for word in answers[-1][0]):
            time.sleep(0.005)
    gate.set()
    for said, thread in answers:
        thread.join()
        assert said[-1] in (("a",), ("b",), ("c",))
    assert order == ["a", "b", "c"]
    assert str(answers[2][0][-2]) in ("waiting, 2 before this", "waiting, 1 before this", "working")


def test_the_rest_of_a_wish_is_dropped_when_there_is_a_newer_one(one):
    wish = one.wish("page")
    assert list(wish.run(walk(1)))[-1] == ("done", 1)
    rest = one.again("page", wish.number)
    assert not rest.superseded
    one.wish("other")
    assert not rest.superseded
    one.wish("page")
    with pytest.raises(Superseded):
        list(rest.run(walk(1)))


def test_a_page_that_is_gone_leaves_no_work_behind(one):
    begun, ended, steps = threading.Event(), threading.Event(), []

    def each(step):
        steps.append(step)
        begun.set()
        time.sleep(0.005)

    def work(callback):
        try:
            return walk(1000, each)(callback)
        finally:
            ended.set()

    answers = one.wish("page").run(work)
    next(answers)
    begun.wait()
    answers.close()
    assert ended.wait(5) and len(steps) < 500
    assert list(one.wish("other").run(walk(1)))[-1] == ("done", 1)


def test_an_error_of_a_work_reaches_who_asked_and_nobody_else(one):
    def broken(callback):
        raise ValueError("no such beta")

    with pytest.raises(ValueError, match="no such beta"):
        list(one.wish("page").run(broken))
    assert list(one.wish("page").run(walk(2)))[-1] == ("done", 2)
    assert one.run(lambda: 3) == 3


def test_closing_ends_what_runs(monkeypatch):
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.01)
    one, begun = Worker(), threading.Event()

    def each(step):
        begun.set()
        time.sleep(0.005)

    said, thread = answer(one.wish("page"), walk(10_000, each))
    begun.wait()
    one.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(said[-1], Superseded)


def test_pages_that_left_long_ago_are_forgotten(one):
    for page in range(worker.MOST_PAGES + 10):
        one.wish(str(page))
    assert len(one._newest) == worker.MOST_PAGES and not one.is_newest("0", 1)


def test_words_say_how_long_it_still_takes():
    assert str(Waiting(0)) == "working" and str(Waiting(2)) == "waiting, 2 before this"
    assert str(Waiting(0, 5, 20, 4.0)) == "evaluation 5 of 20, 12 s left"
    assert str(Waiting(0, 19, 20, 1.0)) == "evaluation 19 of 20"
