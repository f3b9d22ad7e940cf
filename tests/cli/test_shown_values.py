"""Commands print the exact values of data, names and paths, in forms that are the same everywhere. The output contains
nothing that a terminal or a markup language would interpret. The tests run real processes, and read their output as a
person or a script does."""

import csv
import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.lookup.given_keys import given_keys
from shoal.engine.root.export_root import ExportRoot
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.push.push import push_rows
from tests.cli.test_commands import shoal
from tests.stores import load, publish_delta, publish_snapshot, schema

TYPES = {
    "s": "string",
    "f": "float32",
    "d": "float64",
    "b": "bytes",
    "e": "float32[2]",
    "l": "list<float32>",
    "ok": "bool",
}
A = schema("a", key="string", ttl=None, **TYPES)
COUNTED = schema("counted", key="int64", n="int64")
TEXT_USER = schema("user", name="string").model_copy(update={"name": "by_text"})
NUMBER_USER = schema("user", key="int64", name="string").model_copy(update={"name": "by_number"})

EVIL = "[/oops]\x1b]0;title\x07\u202eevil\u2066\u200b\n[bold]:smile:"
SEEN = r"[/oops]\x1b]0;title\x07\u202eevil\u2066\u200b\n[bold]:smile:"
NAN = float("nan")
INFINITY = float("inf")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = ExportRoot(tmp_path_factory.mktemp("shown") / "root")
    store = tmp_path_factory.mktemp("store") / "store"
    numbers = {"f": 0.1, "d": 0.1, "b": b"\x00\xff", "e": [0.1, NAN], "l": [0.1, INFINITY], "ok": True}
    extremes = {"f": -INFINITY, "d": NAN, "e": [16777217.0, -0.0], "l": [], "ok": False}
    rows = [{"a_id": "plain", "s": "[bold]hi[/bold]", **numbers}, {"a_id": EVIL, "s": EVIL, **extremes}]
    publish_snapshot(root, A, rows)
    publish_delta(root, A, [{"a_id": "plain", "s": "[red]", **numbers, "f": 0.2}], [{"a_id": EVIL}])
    publish_snapshot(root, COUNTED, [{"counted_id": n, "n": n} for n in range(10)])
    publish_delta(root, COUNTED, [{"counted_id": n, "n": -n} for n in (1, 2, 100)], [{"counted_id": 3}])
    publish_delta(root, COUNTED, [{"counted_id": n, "n": -n} for n in (2, 3)], [{"counted_id": n} for n in (100, 4)])
    publish_snapshot(root, TEXT_USER, [{"user_id": "7", "name": "text"}])
    publish_snapshot(root, NUMBER_USER, [{"user_id": 7, "name": "number"}])
    load(store, root)
    with StoreWriter(store) as writer:
        push_rows(writer, "counted", {"counted_id": [5, 200], "n": [0, 0]})
        push_rows(writer, "a", {"a_id": [EVIL], "s": [EVIL], "d": [NAN], "f": [INFINITY]})
        push_rows(writer, "counted", deletes={"counted_id": [6, 300]})
    return store


def looked_up(store: Path, form: str, *more: str) -> str:
    keys = ["--key", "a_id=plain", "--key", f"a_id={EVIL}"]
    return shoal("lookup", "--store", store, "--features", "a:*", *keys, "--format", form, *more).stdout


def test_a_table_shows_data_as_it_is_and_obeys_none_of_it(store: Path) -> None:
    for more in ([], ["--explain"]):
        shown = looked_up(store, "table", *more)
        assert SEEN in shown
        assert "[red]" in shown
        assert shown.replace("\n", "").isprintable()
    assert "s: [bold]hi[/bold] → [red], f: 0.1 → 0.2" in shown
    assert "e=[16777216.0, -0.0]" in shown


def test_csv_on_a_terminal_is_obeyed_neither(store: Path) -> None:
    terminal, process_end = pty.openpty()
    command = [sys.executable, "-m", "shoal", "lookup", "--store", str(store), "--features", "a:s", "--format", "csv"]
    process = subprocess.Popen([*command, "--key", f"a_id={EVIL}"], stdout=process_end, stderr=process_end)
    os.close(process_end)
    shown = b""
    while block := read_terminal(terminal):
        shown += block
    os.close(terminal)
    assert process.wait() == 0, shown
    assert SEEN in shown.decode()
    # When a process ends, it resets the terminal's colours.
    assert shown.decode().replace("\r\n", "").removesuffix("\x1b[0m").isprintable()


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # The other end is closed.
        return b""


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_has_values_as_the_server_has_them(store: Path) -> None:
    document = strict(looked_up(store, "json", "--explain"))
    values = {(row["a_id"], row["feature"].removeprefix("a:")): row["value"] for row in document["rows"]}
    assert {name: values["plain", name] for name in TYPES} == {
        "s": "[red]",
        "f": 0.2,
        "d": 0.1,
        "b": "AP8=",
        "e": [0.1, None],
        "l": [0.1, None],
        "ok": True,
    }
    assert [values[EVIL, name] for name in ("s", "f", "d")] == [EVIL, None, None]
    newest, oldest = document["history"]["a"][0]
    assert (newest["values"]["f"], oldest["values"]["f"], oldest["values"]["b"]) == (0.2, 0.1, "AP8=")
    assert oldest["values"]["e"] == [0.1, None]


def test_csv_has_the_very_values_and_no_more_digits_than_they_have(store: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(looked_up(store, "csv"), newline="")))
    values = {(row["a_id"], row["feature"].removeprefix("a:")): row["value"] for row in rows}
    assert {name: values["plain", name] for name in TYPES} == {
        "s": "[red]",
        "f": "0.2",
        "d": "0.1",
        "b": "AP8=",
        "e": "[0.1, NaN]",
        "l": "[0.1, Infinity]",
        "ok": "true",
    }
    assert [values[EVIL, name] for name in ("s", "f", "d", "b")] == [EVIL, "Infinity", "NaN", ""]
    assert math.isnan(float(values[EVIL, "d"]))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["lookup", "--features", f"{EVIL}:s", "--key", "a_id=1", "--store"], 2),
        (["lookup", "--features", "a:s", "--max-age", EVIL, "--key", "a_id=1", "--store"], 2),
        (["load", "--from", f"/nowhere/{EVIL}", "--store"], 1),
        (["verify", f"/nowhere/{EVIL}"], 1),
        ([EVIL], 2),
    ],
    ids=["data", "a usage error", "a path", "an argument", "no command"],
)
def test_errors_show_names_and_paths_and_obey_none(store: Path, arguments: list[str], code: int) -> None:
    done = shoal(*arguments, *([store] if arguments[-1] == "--store" else []), code=code)
    assert r"\x1b" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


def test_what_the_encoding_of_the_output_lacks_is_no_error(store: Path) -> None:
    command = [sys.executable, "-m", "shoal", "lookup", "--store", str(store), "--features", "a:s", "--format", "csv"]
    done = subprocess.run(
        [*command, "--key", "a_id=ü"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True
    )
    assert rb"\xfc" in done.stdout


def test_keys_have_the_types_of_the_views_that_are_asked_for(store: Path) -> None:
    lookup = ["lookup", "--store", store, "--key", "user_id=7", "--json", "--features"]
    (row,) = json.loads(shoal(*lookup, "by_text:name").stdout)["rows"]
    assert (row["user_id"], row["value"]) == ("7", "text")
    refused = shoal(*lookup, "by_text:*,by_number:*", code=2).stderr
    assert "string in view 'by_text' and int64 in view 'by_number'" in refused


@pytest.mark.parametrize("text", ["1_000", "٧", " 7", "7.0", "", "9223372036854775808"])
def test_a_number_of_a_key_is_written_in_digits(text: str) -> None:
    with pytest.raises(LookupInvalid, match=r"is not a whole number from -9223372036854775808 to 9223372036854775807"):
        given_keys([f"user_id={text}"], {"user_id": "int64"})
    assert given_keys(["user_id=-9223372036854775808"], {"user_id": "int64"}) == {"user_id": [-(2**63)]}


def test_a_removal_names_who_removed_the_key(store: Path) -> None:
    arguments = ["--features", "counted:*", "--explain"]
    keys = [part for key in (6, 300, 100) for part in ("--key", f"counted_id={key}")]
    shown = shoal("lookup", "--store", store, *arguments, *keys).stdout
    pushed, never, published = shown.split("\ncounted counted_id=")[1:]
    assert "tombstone: a push deleted the key" in pushed
    assert "tombstone: a push deleted the key" in never
    assert "tombstone: the key vanished from the source" in published


def test_status_counts_keys_and_rows(store: Path) -> None:
    """Status counts a row of a key in the base and in each overlay that changed it, and counts a present key once."""
    status = json.loads(shoal("status", "--store", store, "--json").stdout)
    (counted,) = (view for view in status["views"] if view["name"] == "counted")
    # Of the keys 0 to 9, 4 and 6 were removed. Key 100 was added and removed. Key 200 was added.
    assert counted["keys"] == 9
    assert counted["rows"] == sum(segment["rows"] for segment in (counted["base"], *counted["overlays"])) > 9
    assert (counted["lag_entries"], counted["lag_seconds"], counted["held_by"]) == (None, None, None)
    assert counted["apply_seconds"] >= 0
    table = shoal("status", "--store", store).stdout.splitlines()
    cells = dict(
        zip(table[1].split(), next(line for line in table if line.startswith("counted")).split(), strict=False)
    )
    assert (cells["keys"], cells["rows"]) == ("9", str(counted["rows"]))
    assert (cells["overlays"], cells["view"]) == (str(len(counted["overlays"])), "counted")
