"""Views with every feature type, and rows with difficult values: nulls, NaN, large integers, text."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from shoal.engine.format.schema import FeatureService, ViewSchema
from tests import stores

FEATURES: dict[str, Any] = {
    "flag": "bool",
    "small": "int32",
    "large": "int64",
    "single": "float32",
    "double": "float64",
    "text": "string",
    "blob": "bytes",
    "at": "timestamp",
    "integers": "list<int64>",
    "floats": "list<float32>",
    "words": "list<string>",
    "vector": "float32[3]",
}
ITEMS = stores.schema("items", **FEATURES)
USERS = stores.schema("users", key="int64", score="float32", text="string")
PAIRS = ViewSchema.model_validate(
    {
        "name": "pairs",
        "join_keys": [{"name": "users_id", "type": "int64"}, {"name": "items_id", "type": "string"}],
        "features": [{"name": "seen", "type": "bool"}, {"name": "times", "type": "int32"}],
    }
)
RECENT = stores.schema("recent", ttl=timedelta(hours=1), clicks="int64", rate="float32")
SERVICE = FeatureService(name="ranking", features=("items:single", "users:*"))

HARD_ROWS: list[dict[str, Any]] = [
    {"items_id": "nulls"},
    {
        "items_id": "extremes",
        "flag": True,
        "small": -(2**31),
        "large": 2**53 + 1,
        "single": float("nan"),
        "double": float("nan"),
        "text": 'quote " backslash \\ newline \n and \u2603 \U0001f600',
        "blob": b"\x00\xff",
        "at": datetime(1, 1, 1, tzinfo=UTC),
        "integers": [2**63 - 1, -(2**63)],
        "floats": [0.1, 0.2],
        "words": ["", "é", "z"],
        "vector": [0.1, 0.0, -1.5],
    },
    {
        "items_id": "empties",
        "flag": False,
        "small": 0,
        "large": -(2**63),
        "single": 0.0,
        "double": 0.1,
        "text": "",
        "blob": b"",
        "at": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        "integers": [],
        "floats": [],
        "words": [],
        "vector": [0.0, 0.0, 0.0],
    },
]


def item_rows(count: int, view: ViewSchema = ITEMS) -> list[dict[str, Any]]:
    """Return the difficult rows and `count` random ones, with a quarter of the random values null. The rows are always
    the same."""
    source = random.Random(7)
    rows = [dict(row) for row in HARD_ROWS]
    for number in range(count):
        row = {feature.name: _value(source, feature.type) for feature in view.features}
        for name in row:
            if source.random() < 0.25:
                row[name] = None
        time = datetime(2025, 6, 1, tzinfo=UTC) + timedelta(microseconds=source.randrange(10**12))
        rows.append({"items_id": f"item-{number}", stores.TIMESTAMP: time} | row)
    return rows


def user_rows(count: int) -> list[dict[str, Any]]:
    """Return the users 0 to `count` - 1."""
    return [{"users_id": number, "score": number / 4, "text": f"user {number}"} for number in range(count)]


def pair_rows() -> list[dict[str, Any]]:
    """Return the users 0 to 3 with the items 0 to 3 each."""
    return [
        {"users_id": user, "items_id": f"item-{item}", "seen": item % 2 == 0, "times": None if user == 1 else item}
        for user in range(4)
        for item in range(4)
    ]


def recent_rows() -> list[dict[str, Any]]:
    """Return one row inside the view's TTL, one outside, and one outside with a null value."""
    now = datetime.now(UTC)
    old = now - timedelta(days=2)
    return [
        {"recent_id": "fresh", "clicks": 1, "rate": 0.5, stores.TIMESTAMP: now},
        {"recent_id": "stale", "clicks": 2, "rate": 0.25, stores.TIMESTAMP: old},
        {"recent_id": "stale-null", "clicks": 3, "rate": None, stores.TIMESTAMP: old},
    ]


def _value(source: random.Random, feature_type: str) -> Any:
    match feature_type:
        case "bool":
            return source.random() < 0.5
        case "int32":
            return source.randrange(-(2**31), 2**31)
        case "int64":
            return source.randrange(-(2**63), 2**63)
        case "float32":
            return source.randrange(-1000, 1000) / 16
        case "float64":
            return source.uniform(-1e9, 1e9)
        case "string":
            return "".join(source.choices("abc é☃", k=source.randrange(12)))
        case "bytes":
            return source.randbytes(source.randrange(12))
        case "timestamp":
            return datetime(2025, 1, 1, tzinfo=UTC) + timedelta(microseconds=source.randrange(10**13))
        case "list<int64>":
            return [source.randrange(-(2**63), 2**63) for _ in range(source.randrange(4))]
        case "list<float32>":
            return [source.randrange(100) / 8 for _ in range(source.randrange(4))]
        case "list<string>":
            return ["".join(source.choices("xyzü", k=source.randrange(5))) for _ in range(source.randrange(4))]
        case _:
            return [source.randrange(100) / 8 for _ in range(3)]
