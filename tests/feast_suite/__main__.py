"""Run Feast's own online store tests against Shoal's store or another one: `make feast-suite`.

Feast's package does not contain these tests. They come from Feast's git repository, at the tag of the installed
release. If that tag is missing, the latest earlier tag is used. `FEAST_REPOSITORY` names another clone of the
repository. The tests are stored in the current virtual environment, and nothing else is left behind.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

_REPOSITORY = os.environ.get("FEAST_REPOSITORY", "https://github.com/feast-dev/feast")
_SOURCES = Path(sys.prefix) / "feast-sources"
_NEEDED = ("/sdk/python/tests/", "/sdk/python/pytest.ini")

_SUITES = (
    "tests/integration/online_store/test_universal_online.py",
    "tests/integration/online_store/test_universal_online_types.py",
    "tests/integration/online_store/test_push_features_to_online_store.py",
    "tests/integration/online_store/test_universal_e2e.py",
    "tests/integration/materialization/test_universal_materialization.py",
    "tests/integration/registration/test_universal_odfv_feature_inference.py",
)

_LEFT_OUT = {
    "test_universal_online.py::test_async_online_retrieval_with_event_timestamps_dynamo": "which needs Docker",
    "test_push_features_to_online_store.py::test_push_features_and_read_async_dynamodb": "which needs Docker",
    "test_universal_online.py::test_entity_ttl_online_store": "which sets key_ttl_seconds, a setting of Redis only",
}
"""Tests that are skipped for every store, with the reason."""


@dataclass(frozen=True)
class Store:
    """An online store under test.

    `type` is its type in a feature_store.yaml, and `place` is the setting for its path. `offered_as` lists Feast's own
    stores whose tests it runs: it decides which of the tests marked for single stores are run.
    """

    type: str
    place: str
    offered_as: Sequence[str]


_STORES = {
    # Like Redis, the newest event time wins and a deleted view comes back empty. Like MongoDB, writes may be
    # asynchronous. Like SQLite, values of every type are read back unchanged.
    "shoal": Store("shoal.feast.ShoalOnlineStore", "store", ("redis", "mongodb", "sqlite")),
    "sqlite": Store("sqlite", "path", ("sqlite",)),
}

_OUTCOMES = ("passed", "failure", "error", "skipped")

Counts = dict[str, Counter[str]]
"""File → outcome → number of tests."""


def main() -> int:
    """Run the tests, print a summary and return pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.feast_suite", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", choices=_STORES, default="shoal", help="what is tested (default: %(default)s)")
    parser.add_argument("pytest_options", nargs="*", metavar="OPTION", help="for pytest, after --, such as -k cleanup")
    arguments = parser.parse_args()
    tests = _fetch_tests()
    with tempfile.TemporaryDirectory(prefix="feast-suite-") as scratch:
        report = Path(scratch) / "report.xml"
        code = _run(tests, _STORES[arguments.store], report, arguments.pytest_options)
        if not report.exists():
            return code or 1
        counts, skipped = _read_report(report)
    _sum_up(arguments.store, tests.parents[1].name, counts, skipped)
    return code


def _fetch_tests() -> Path:
    """Return the directory of Feast's tests, and fetch them first if they are missing."""
    tag = _nearest_tag(version("feast"))
    clone = _SOURCES / tag
    if not (clone / "sdk/python/pytest.ini").exists():
        shutil.rmtree(clone, ignore_errors=True)
        clone.parent.mkdir(exist_ok=True)
        # The repository has hundreds of megabytes, but only a few hundred small files are needed.
        partly = ["--quiet", "--depth=1", "--filter=blob:none", "--no-checkout"]
        _git("-c", "advice.detachedHead=false", "clone", *partly, "--branch", tag, _REPOSITORY, str(clone))
        _git("-C", str(clone), "sparse-checkout", "set", "--no-cone", *_NEEDED)
        _git("-C", str(clone), "checkout", "--quiet")
    return clone / "sdk/python"


def _nearest_tag(release: str) -> str:
    listed = re.findall(r"refs/tags/v(\d+\.\d+\.\d+)$", _git("ls-remote", "--tags", _REPOSITORY), re.MULTILINE)
    earlier = [tag for tag in listed if _numbers(tag) <= _numbers(release)]
    if not earlier:
        sys.exit(f"{_REPOSITORY} has no tag of Feast {release} or before; name another clone by FEAST_REPOSITORY")
    return f"v{max(earlier, key=_numbers)}"


def _numbers(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release)[:3]]


def _git(*arguments: str) -> str:
    try:
        return subprocess.check_output(["git", *arguments], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}; Feast's tests come by git from {_REPOSITORY}: name another clone by FEAST_REPOSITORY")


def _run(tests: Path, store: Store, report: Path, options: Sequence[str]) -> int:
    """Run pytest on Feast's tests and return its exit code."""
    environment = os.environ | {
        "FULL_REPO_CONFIGS_MODULE": "offered_stores",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
        "FEAST_SUITE_STORE": json.dumps(asdict(store)),
        # Without this, tests marked for Redis end before they begin and count as passed.
        "FEAST_IS_LOCAL_TEST": "False",
        "FEAST_USAGE": "False",
        "TMPDIR": str(report.parent),
    }
    command = [sys.executable, "-m", "pytest", "--integration", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--tb=short", "-q", "-rfE", "--disable-warnings", f"--junitxml={report}", *_SUITES]
    for test in _LEFT_OUT:
        file, _, name = test.partition("::")
        command += [f"--deselect={suite}::{name}" for suite in _SUITES if suite.endswith(f"/{file}")]
    # A separate process group, because the tests start Feast servers that outlive them.
    with subprocess.Popen([*command, *options], cwd=tests, env=environment, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_report(path: Path) -> tuple[Counts, Counter[str]]:
    """Return the outcomes of the tests of each file, and the number of skipped tests for each reason."""
    counts: Counts = defaultdict(Counter)
    skipped: Counter[str] = Counter()
    for case in ET.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in _OUTCOMES), "passed")
        counts[case.get("classname", "").rpartition(".")[2]][outcome] += 1
        for child in case.iter("skipped"):
            message = str(child.get("message"))
            skipped["marked for other stores" if "empty parameter set" in message else message] += 1
    return counts, skipped


def _sum_up(store: str, tag: str, counts: Counts, skipped: Counter[str]) -> None:
    print(f"\nFeast {version('feast')}, its tests of {tag}, online store {store}")
    print(f"{'':44}" + "".join(f"{outcome:>9}" for outcome in _OUTCOMES))
    for file, of_file in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{file:44}" + "".join(f"{of_file[outcome]:9}" for outcome in _OUTCOMES))
    for reason, number in skipped.items():
        print(f"skipped: {number}, {reason}")
    for test, reason in _LEFT_OUT.items():
        print(f"left out: {test}, {reason}")


if __name__ == "__main__":
    sys.exit(main())
