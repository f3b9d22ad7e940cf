"""Child processes live as long as their parent."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from shoal.engine.process.lifeline import Lifeline
from tests.server.serving import eventually, is_gone


@pytest.fixture
def lifeline() -> Lifeline:
    return Lifeline()


@pytest.fixture
def child(lifeline: Lifeline) -> Iterator[int]:
    pid = os.fork()
    if not pid:
        lifeline.hold(beats=True)
        while True:
            time.sleep(60)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_children_give_signs_of_life_and_end_with_their_parent(lifeline: Lifeline, child: int) -> None:
    assert eventually(lifeline.signs, "a sign of life") == {child}
    assert not is_gone(child)
    lifeline.close()
    eventually(lambda: is_gone(child), "the child's end")


def test_a_child_ends_too_whose_parent_died_just_as_it_gave_a_sign_of_life(lifeline: Lifeline, child: int) -> None:
    eventually(lifeline.signs, "a sign of life")
    # A dying process closes one pipe after the other.
    os.close(lifeline._signs[0])
    time.sleep(2.5)
    lifeline._signs = os.pipe()
    lifeline.close()
    eventually(lambda: is_gone(child), "the child's end")
