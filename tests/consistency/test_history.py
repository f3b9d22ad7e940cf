"""The whole system while processes are killed: clients write and read, and the checker compares their history with the
promises of the store. For runs of any length, see `python -m tests.consistency --help`."""

import os
from pathlib import Path

import pytest

from tests.consistency.planted import PLANTED
from tests.consistency.run import run

SECONDS = float(os.environ.get("SHOAL_CONSISTENCY_SECONDS", "30"))
PLANTED_SECONDS = float(os.environ.get("SHOAL_CONSISTENCY_PLANTED_SECONDS", "0"))


def test_a_history_of_clients_keeps_all_promises_though_processes_are_killed(tmp_path: Path) -> None:
    report = run(tmp_path, SECONDS, least=("pushes acknowledged", "pushes repeated after their answer", "deltas"))
    print(report)
    assert report.wrongs == [], report
    for seen in ("pushes acknowledged", "pushes repeated after their answer", "reads", "deltas", "versions seen"):
        assert report.counts[seen] > 5, report


@pytest.mark.skipif(not PLANTED_SECONDS, reason="set SHOAL_CONSISTENCY_PLANTED_SECONDS, to 10 say, to look for bugs")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(tmp_path: Path, bug: str) -> None:
    assert run(tmp_path, PLANTED_SECONDS, planted=bug, kill=False).wrongs != []
