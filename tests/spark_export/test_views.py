"""views.yaml: the meaning of a valid file, and the place of each error in an invalid one."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from shoal.engine.base.errors import DefinitionError
from shoal.engine.format.schema import Feature, JoinKey, ViewSchema
from shoal.spark_export.views.definition import DEFAULT_SHARDS, load_views

GOOD = """\
views:
  - name: docs
    join_keys: [{name: doc_id, type: string}]
    features:
      - {name: clicks_7d, type: int64}
      - {name: ctr, type: float32, tolerance: 0.001}
      - {name: emb, type: "float32[64]"}
    timestamp_field: event_timestamp
    ttl: 7d
    source: {path: data/docs, format: csv, options: {header: true}}
    shards: 4

  - name: users
    join_keys:
      - {name: region, type: string}
      - {name: user_id, type: int64}
    features: [{name: age, type: int32}]
    source: {table: db.users}

services:
  - {name: ranker_v1, features: ["docs:clicks_7d", "users:*"]}
"""


def test_a_right_file(tmp_path: Path) -> None:
    (tmp_path / "views.yaml").write_text(GOOD)
    loaded = load_views(tmp_path / "views.yaml")
    docs, users = loaded.views
    assert docs.schema == ViewSchema(
        name="docs",
        join_keys=(JoinKey(name="doc_id", type="string"),),
        features=(
            Feature(name="clicks_7d", type="int64"),
            Feature(name="ctr", type="float32"),
            Feature(name="emb", type="float32[64]"),
        ),
        ttl=timedelta(days=7),
        timestamp_field="event_timestamp",
    )
    assert [feature.tolerance for feature in docs.features] == [None, 0.001, None]
    assert (docs.timestamp_field, docs.shards) == ("event_timestamp", 4)
    assert docs.source is not None
    assert (docs.source.path, docs.source.options) == (str(tmp_path / "data/docs"), {"header": True})
    assert str(docs.source) == f"csv {tmp_path}/data/docs"
    assert (users.ttl, users.timestamp_field, users.shards) == (None, None, DEFAULT_SHARDS)
    assert str(users.source) == "table db.users"
    assert loaded.services[0].features == ("docs:clicks_7d", "users:*")
    assert docs.future == "refuse"


@pytest.mark.parametrize("path", ["day:1/docs", "rows:1.csv", "a[1]/{b}"])
def test_a_path_with_signs_in_it_is_relative_to_the_file(tmp_path: Path, path: str) -> None:
    (tmp_path / "views.yaml").write_text(GOOD.replace("data/docs", f"'{path}'"))
    source = load_views(tmp_path / "views.yaml").views[0].source
    assert source is not None
    assert source.path == f"{tmp_path}/{path}"


@pytest.mark.parametrize("path", ["/data/docs", "s3a://bucket/docs", "hdfs:/docs", "file:///data/docs"])
def test_a_path_that_is_not_relative_is_left_as_it_is(tmp_path: Path, path: str) -> None:
    (tmp_path / "views.yaml").write_text(GOOD.replace("data/docs", path))
    source = load_views(tmp_path / "views.yaml").views[0].source
    assert source is not None
    assert source.path == path


WRONG: list[tuple[str, str, int, str]] = [
    (
        "type: int64}\n      - {name: ctr",
        "type: int46}\n      - {name: ctr",
        5,
        "type: unknown type 'int46'; use one of",
    ),
    ("float32[64]", "float32[0]", 7, "type: unknown type 'float32[0]'"),
    ("float32, tolerance", "string, tolerance", 6, "a tolerance needs one of the types int32, int64, float32, float64"),
    ("tolerance: 0.001", "tolerance: -1", 6, "tolerance: input should be greater than 0, but it is -1"),
    ("tolerance: 0.001", "tolerance: .inf", 6, "tolerance: input should be a finite number"),
    ("name: ctr", "name: 7ctr", 6, "'7ctr' is not a name; use a letter, then letters, digits and underscores"),
    ("name: ctr", "name: no", 6, "name: input should be a valid string, but it is False"),
    ("name: ctr", "name: Doc_ID", 6, "the view has two columns 'Doc_ID'; rename one"),
    ("{name: ctr, type: float32, ", "{name: ctr, ", 6, "'type' is missing; add it"),
    ("ttl: 7d", "ttl: 7 days", 9, "ttl: '7 days' is not a duration"),
    ("type: int64", "type: bytes, feast_member: json_val", 5, "unknown key 'feast_member'; remove it"),
    ("ttl: 7d", "future: maybe", 9, "future: input should be 'refuse' or 'allow', but it is 'maybe'"),
    ("ttl: 7d", "ttl: 0d", 9, "ttl: '0d' is not a duration"),
    ("ttl: 7d", "max_removed: 20", 9, "max_removed: expected a share such as 20% or 0.2, from 0% to 100%, found 20"),
    ("ttl: 7d", "max_removed: 101%", 9, "from 0% to 100%, found '101%'"),
    ("ttl: 7d", "max_removed: -1%", 9, "from 0% to 100%, found '-1%'"),
    ("ttl: 7d", "max_removed: true", 9, "from 0% to 100%, found True"),
    ("ttl: 7d", "max_removed: .nan", 9, "from 0% to 100%, found nan"),
    ("ttl: 7d", "max_removed: [0.2]", 9, "from 0% to 100%, found [0.2]"),
    ("ttl: 7d", "max_removd: 20%", 9, "unknown key 'max_removd'; did you mean 'max_removed'?"),
    ("ttl: 7d", "tll: 7d", 9, "unknown key 'tll'; did you mean 'ttl'?"),
    ("ttl: 7d", "ttl: 7d\n    ttl: 8d", 10, "the key 'ttl' is given twice, first in line 9; remove one"),
    ("ttl: 7d", "ttl: [7d", 10, "not valid YAML: "),
    ("ttl: 7d", "ttl: *week", 9, "not valid YAML: found undefined alias"),
    (
        "ttl: 7d",
        "table: docs",
        9,
        "'table' names 'docs', but the view's tier is local; give tier: dynamodb, or no table",
    ),
    ("ttl: 7d", "tier: redis", 9, "tier: input should be 'local' or 'dynamodb', but it is 'redis'"),
    ("shards: 4", "tier: dynamodb\n    table: a b", 12, "'a b' is not a table name; use 3 to 255 letters, digits"),
    ("shards: 4", "shards: 0", 11, "shards: input should be greater than or equal to 1, but it is 0"),
    ("{path: data/docs, ", "{table: docs, ", 10, "'format' belongs to a path, not to table; remove it"),
    ("{table: db.users}", "{table: db.users, sql: SELECT 1}", 18, "one of path, table and sql, but table and sql is"),
    ("{table: db.users}", "{}", 18, "a source is one of path, table and sql, but none is given"),
    ("{table: db.users}", "db.users", 18, "source: expected a mapping of names to values, found 'db.users'"),
    ("    source: {table: db.users}\n", "", 13, "a view needs a source, a stream, or both; add one"),
    (
        "    source: {table: db.users}",
        "    stream: {format: rate}",
        18,
        "a view with a stream needs a timestamp_field: the column of event times",
    ),
    (
        "source: {path",
        "stream: {format: json, path: a}\n    source: {path",
        10,
        "a stream of json files needs 'columns'",
    ),
    (
        "source: {path",
        "stream: {format: kafka}\n    source: {path",
        10,
        "needs the options kafka.bootstrap.servers and",
    ),
    ("source: {path", "stream: {format: kafka, path: a}\n    source: {path", 10, "a stream of Kafka has no path"),
    ("source: {path", "stream: {format: rate, event_time: a}\n    source: {path", 10, "event_time and watermark go"),
    ("source: {path", "stream: {format: rate, colums: a}\n    source: {path", 10, "did you mean 'columns'?"),
    ("name: user_id, type: int64", "name: user_id, type: int32", 16, "type: input should be 'string' or 'int64'"),
    ("name: users", "name: docs", 13, "view 'docs' is defined twice; rename one"),
    ("docs:clicks_7d", "docs:cliks_7d", 21, "names no feature of view 'docs'; did you mean 'clicks_7d'?"),
    ("docs:clicks_7d", "dogs:clicks_7d", 21, "'dogs:clicks_7d' names no view of this file; it has docs, users"),
    ("docs:clicks_7d", "docs", 21, "'docs' names no feature; write view:feature, or view:*"),
    (
        "services:\n",
        "services:\n  - {name: ranker_v1, features: ['docs:*']}\n",
        22,
        "service 'ranker_v1' is defined twice",
    ),
    ("services:\n", "services: 3\nx:\n", 20, "services: expected a list, found 3"),
    (GOOD, "views: []", 1, "views: expected at least one entry, found none"),
    (GOOD, "- 1", 1, "the file: expected a mapping of names to values, found [1]"),
    (GOOD, "views: &all [*all]", 1, ""),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), WRONG, ids=[wrong[1][:30] for wrong in WRONG])
def test_a_wrong_file(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert GOOD.count(old) >= 1
    path = tmp_path / "views.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(DefinitionError) as raised:
        load_views(path)
    first = str(raised.value).partition("\n")[0]
    assert first.startswith(f"{path}:{line}: ")
    assert message in first


MISTAKES: list[tuple[str, str, str]] = [
    (
        'type: "float32[64]"}',
        "type: float32[64]}",
        "7: not valid YAML: expected ',' or '}', but got '['; inside braces a text with brackets needs quotes: "
        '"float32[64]"',
    ),
    ("type: int64}\n      - {name: ctr", "type: list[string]}\n      - {name: ctr", 'quotes: "list[string]"'),
    ("    ttl: 7d", "\tttl: 7d", "that cannot start any token; indent with spaces: YAML does not allow tabs"),
    (
        "join_keys: [{name: doc_id, type: string}]",
        "join_key: doc_id",
        "3: unknown key 'join_key'; did you mean 'join_keys'? write join_keys: [{name: doc_id, type: string}]",
    ),
    ("join_keys: [", "entities: [", "3: unknown key 'entities'; did you mean 'join_keys'? write join_keys: [{name: "),
    (
        "join_keys: [{name: doc_id, type: string}]",
        "join_keys: doc_id",
        "3: join_keys: expected a list, found 'doc_id'; write join_keys: [{name: doc_id, type: string}]",
    ),
    (
        "join_keys: [{name: doc_id, type: string}]",
        "join_keys: [doc_id]",
        "found 'doc_id'; write join_keys: [{name: doc_id, type: string}]",
    ),
    ("source: {path: data", "batch_source: {path: data", "10: unknown key 'batch_source'; did you mean 'source'?"),
    (
        "timestamp_field:",
        "event_timestamp_column:",
        "8: unknown key 'event_timestamp_column'; did you mean 'timesta",
    ),
    (
        "{name: clicks_7d, type",
        "{name:clicks_7d, type",
        "5: unknown key 'name:clicks_7d'; a colon needs a space after it: name: clicks_7d",
    ),
    ("clicks_7d, type: int64", "clicks_7d, dtype: int64", "5: unknown key 'dtype'; did you mean 'type'?"),
    ("clicks_7d, type: int64", "clicks_7d, type: Int", "did you mean 'int64'?"),
    ("clicks_7d, type: int64", "clicks_7d, type: double", "did you mean 'float64'?"),
    ("clicks_7d, type: int64", 'clicks_7d, type: "list[str]"', "did you mean 'list<string>'?"),
    ("doc_id, type: string", "doc_id, type: varchar", "but it is 'varchar'; did you mean 'string'?"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[mistake[1][:30] for mistake in MISTAKES])
def test_a_mistake_that_newcomers_make_gets_one_message_with_the_fix(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "views.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1).replace(', "users:*"', "").replace("docs:clicks_7d", "docs:ctr"))
    with pytest.raises(DefinitionError) as raised:
        load_views(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "views.yaml"
    path.write_text("""\
views:
  - name: docs
    join_key: doc_id
    features:
      - {name: clicks, type: int}
      - {name: clicks, type: string, tolerance: 1}
    ttl: 7 days
    tabel: docs
  - name: docs
    join_keys: [{name: user_id, type: int64}]
    features: []
    stream: {format: json, event_time: at}
    source: {table: a, sql: b}
services:
  - {name: ranker, features: ["docs:clicsk", "dogs:*", docs]}
  - {name: ranker}
""")
    with pytest.raises(DefinitionError) as raised:
        load_views(path)
    told = [line.removeprefix(f"{path}:") for line in str(raised.value).split("\n")]
    expected = [
        "2: a view needs a source, a stream, or both",
        "3: unknown key 'join_key'; did you mean 'join_keys'?",
        "5: type: unknown type 'int'",
        "6: the view has two columns 'clicks'",
        "6: a tolerance needs one of the types",
        "7: ttl: '7 days' is not a duration",
        "8: unknown key 'tabel'",
        "9: view 'docs' is defined twice",
        "11: features: expected at least one entry",
        "12: a view with a stream needs a timestamp_field",
        "12: a stream of json files needs 'path'",
        "12: a stream of json files needs 'columns'",
        "12: event_time and watermark go together",
        "13: a source is one of path, table and sql",
        "15: 'docs:clicsk' names no feature",
        "15: 'dogs:*' names no view",
        "15: 'docs' names no feature",
        "16: service 'ranker' is defined twice",
        "16: 'features' is missing",
    ]
    assert [line for line in expected if not any(found.startswith(line) for found in told)] == [], told
    assert len(told) == len(expected), told
    lines = [int(line.partition(":")[0]) for line in told]
    assert lines == sorted(lines)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"cannot read .*none\.yaml: No such file or directory"):
        load_views(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(DefinitionError, match=r"empty\.yaml is empty; it must define views"):
        load_views(tmp_path / "empty.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"views: \xff\xfe")
    with pytest.raises(DefinitionError, match=r"binary\.yaml is not UTF-8 text"):
        load_views(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "share"),
    [("20%", 0.2), ("12.5 %", 0.125), ("29%", 0.29), ("0.1%", 0.001), ("0", 0.0), ("1", 1.0), ("0.35", 0.35)],
)
def test_a_share_is_a_percentage_or_a_fraction(tmp_path: Path, text: str, share: float) -> None:
    path = tmp_path / "views.yaml"
    path.write_text(GOOD.replace("ttl: 7d", f"max_removed: {text}"))
    docs, users = load_views(path).views
    assert (docs.max_removed, users.max_removed) == (share, None)


def test_definitions_and_the_command_load_without_pyspark() -> None:
    program = "import sys; sys.modules['pyspark'] = None; import shoal.spark_export.cli.export_command"
    subprocess.run([sys.executable, "-c", program], check=True)
