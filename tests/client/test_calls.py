"""The decisions of a call, step by step, on a clock that the test controls."""

import random
from collections import Counter

import pytest

from shoal.client import budgets
from shoal.client.addresses import parse_address
from shoal.client.budgets import Budget
from shoal.client.calls import Attempt, Call, Done, Policy, Unreached, Wait
from shoal.client.errors import DeadlineExceeded, NoAnswer, Overloaded, ServerError
from shoal.client.replicas import Limits, ReplicaSet
from shoal.client.wire import TIMEOUT_HEADER, Request, Response

LOOKUP = Request("POST", "/v1/lookup", b"{}", may_hedge=True)
ANSWER = Response(200, {}, b"{}")
OVERLOADED = Response(503, {"retry-after": "1"}, b'{"error": {"code": "Overloaded", "message": "m"}}')


def replicas(count: int, **limits: float) -> ReplicaSet:
    return ReplicaSet([parse_address(f"http://h{number}") for number in range(count)], Limits(**limits))  # type: ignore[arg-type]


def begin(call: Call, now: float) -> Attempt:
    step = call.next(now)
    assert isinstance(step, Attempt)
    return step


def test_the_deadline_is_sent_and_shrinks_with_each_try() -> None:
    call = Call(LOOKUP, replicas(2), Policy(), deadline=1.0)
    first = begin(call, 0.0)
    assert first.headers[TIMEOUT_HEADER] == "1000"
    assert call.next(0.1) == Wait(1.0)
    call.failed(first, ConnectionResetError(), 0.25)
    second = begin(call, 0.25)
    assert (second.headers[TIMEOUT_HEADER], second.replica is first.replica) == ("750", False)
    end = call.next(1.0)
    assert isinstance(end, Done)
    assert isinstance(end.outcome, DeadlineExceeded)
    assert "before that: http://h" in str(end.outcome)


def test_after_tries_enough_the_last_error_is_told() -> None:
    call = Call(LOOKUP, replicas(1), Policy(max_tries=3), deadline=10.0)
    now, tries = 0.0, 0
    while not isinstance(end := call.next(now), Done):
        if isinstance(end, Wait):
            now = end.until
        else:
            tries += 1
            call.failed(end, ConnectionRefusedError("refused"), now)
    assert tries == 3
    assert isinstance(end.outcome, NoAnswer)
    assert 0.0 < now < 0.5


def test_another_replica_is_asked_at_once_and_the_same_when_it_said() -> None:
    call = Call(LOOKUP, replicas(2), Policy(), deadline=5.0)
    first = begin(call, 0.0)
    call.answered(first, OVERLOADED, 0.01)
    second = begin(call, 0.01)
    assert second.replica is not first.replica
    call.answered(second, OVERLOADED, 0.02)
    step = call.next(0.02)
    assert isinstance(step, Wait)
    assert 1.02 <= step.until <= 1.6
    begin(call, step.until)


def test_what_no_server_saw_goes_to_another_at_no_cost_to_the_budget() -> None:
    everyone = replicas(2, retry_share=0.0, retry_reserve=1)
    dead, well = everyone.replicas
    calls = [Call(LOOKUP, everyone, Policy(), deadline=5.0, avoid=[well]) for _ in range(50)]
    for call, attempt in [(call, begin(call, 0.0)) for call in calls]:
        assert attempt.replica is dead
        call.failed(attempt, Unreached("refused"), 0.1)
        assert begin(call, 0.1).replica is well
    # A retry uses up the budget if a server may have seen the request, or if it goes to the same server.
    for error, servers in (
        (ConnectionResetError(), replicas(2, retry_share=0.0, retry_reserve=0)),
        (Unreached(), None),
    ):
        call = Call(LOOKUP, servers or replicas(1, retry_share=0.0, retry_reserve=0), Policy(), deadline=5.0)
        call.failed(begin(call, 0.0), error, 0.1)
        assert isinstance(call.next(0.1), Done)


def test_what_ends_with_its_deadline_is_late() -> None:
    call = Call(LOOKUP, replicas(1), Policy(), deadline=1.0)
    call.failed(begin(call, 0.0), TimeoutError(), 0.9995)
    assert call.next(0.9995) == Wait(1.0)
    end = call.next(1.0)
    assert isinstance(end, Done)
    assert isinstance(end.outcome, DeadlineExceeded)


def test_what_cannot_be_in_time_is_not_waited_for() -> None:
    call = Call(LOOKUP, replicas(1), Policy(), deadline=0.5)
    call.answered(begin(call, 0.0), OVERLOADED, 0.01)
    end = call.next(0.01)
    assert isinstance(end, Done)
    assert isinstance(end.outcome, Overloaded)
    assert end.outcome.retry_after == 1.0


def test_what_is_wrong_with_the_request_is_not_repeated() -> None:
    for status in (400, 401, 404, 409, 413, 421, 500, 504, 507):
        call = Call(LOOKUP, replicas(3), Policy(), deadline=1.0)
        call.answered(begin(call, 0.0), Response(status, {}, b"?"), 0.1)
        end = call.next(0.1)
        assert isinstance(end, Done)
        assert isinstance(end.outcome, ServerError)


def test_a_hedge_goes_to_another_and_the_first_answer_counts() -> None:
    everyone = replicas(2)
    call = Call(LOOKUP, everyone, Policy(hedge=0.1), deadline=1.0)
    first = begin(call, 0.0)
    assert not first.is_alone
    assert call.next(0.05) == Wait(0.1)
    second = begin(call, 0.1)
    assert second.replica is not first.replica
    assert call.next(0.1) == Wait(1.0)
    call.answered(second, ANSWER, 0.2)
    assert call.next(0.2) == Done(ANSWER)
    call.answered(first, ANSWER, 0.3)  # It is too late, and is ignored.
    assert [replica.in_flight for replica in everyone.replicas] == [0, 0]


def test_several_hedges_go_to_as_many_others_within_the_number_of_tries() -> None:
    for tries in (1, 2, 4):
        call = Call(LOOKUP, replicas(4), Policy(max_tries=tries, hedge=0.1, max_hedges=9), deadline=1.0)
        asked = [begin(call, 0.0).replica]
        for tenth in range(1, 10):
            step = call.next(tenth / 10)
            if isinstance(step, Attempt):
                asked.append(step.replica)
        assert len(asked) == len(set(asked)) == tries


def test_hedges_stay_within_their_budget() -> None:
    everyone = replicas(2, hedge_share=0.05, hedge_reserve=2)
    hedges = 0
    for _ in range(200):
        call = Call(LOOKUP, everyone, Policy(hedge=0.1), deadline=1.0)
        attempt = begin(call, 0.0)
        step = call.next(0.1)
        if isinstance(step, Attempt):
            hedges += 1
            call.answered(step, ANSWER, 0.15)
        else:
            call.answered(attempt, ANSWER, 0.15)
        everyone.replicas[0].ejected_until = everyone.replicas[1].ejected_until = 0.0
        assert isinstance(call.next(0.15), Done)
    assert 5 <= hedges <= 2 + 10


def test_a_failing_replica_is_left_out_longer_each_time() -> None:
    everyone = replicas(3)
    bad = everyone.replicas[0]
    now = 0.0
    for least in (0.4, 0.8, 1.6, 3.2):
        everyone.begin(bad)
        everyone.failed(bad, now, now)
        assert bad.ejected_until - now >= least
        picked = Counter(everyone.pick(now + 0.01) for _ in range(50))
        assert bad not in picked
        now = bad.ejected_until + 0.01
        # One request tries it, and the other requests use other replicas until that one has ended.
        everyone.replicas[1].in_flight = everyone.replicas[2].in_flight = 1000
        assert [everyone.pick(now) for _ in range(20)].count(bad) <= 1
        everyone.replicas[1].in_flight = everyone.replicas[2].in_flight = 0
    everyone.answered(bad, 0.01)
    assert bad.ejected_until == bad.failures == 0
    for replica in everyone.replicas:
        everyone.failed(replica, now, now)
    assert everyone.pick(now) in everyone.replicas


def test_many_requests_that_one_failure_meets_leave_a_replica_out_once() -> None:
    everyone = replicas(2)
    dead, well = everyone.replicas
    calls = [Call(LOOKUP, everyone, Policy(), deadline=5.0, avoid=[well]) for _ in range(200)]
    for call, attempt in [(call, begin(call, 1.0)) for call in calls]:
        call.failed(attempt, Unreached("refused"), 1.1)
    assert dead.ejected_until <= 1.1 + 0.6
    assert dead.in_flight == 0


def test_the_less_busy_of_two_is_asked() -> None:
    everyone = replicas(2)
    busy, idle = everyone.replicas
    busy.in_flight = 3
    assert [everyone.pick(0.0) for _ in range(3)] == [idle] * 3
    assert everyone.pick(0.0, avoid=[idle]) is busy


def test_a_budget_is_a_share_of_what_was_done_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(budgets, "monotonic", lambda: clock[0])
    budget = Budget(0.1, 2)
    source = random.Random(3)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(100):
        clock[0] += source.choice([0, 0.03])
        budget.count()
    assert sum(budget.take() for _ in range(50)) == 10
    clock[0] += 20
    assert [budget.take() for _ in range(3)] == [True, True, False]
