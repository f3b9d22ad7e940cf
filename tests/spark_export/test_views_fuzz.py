"""Any content of views.yaml either defines views or raises one error that names the file."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine.base.errors import DefinitionError
from shoal.spark_export.views.definition import load_views
from tests.spark_export.test_views import GOOD

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "100"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = ["2026-99-99", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a}"]
NUMBERS = ["0x", "0b2", "1:99:99", "1_0", ".inf", ".nan", "-.inf", "~", "9" * 5000, "!!omap [a]", "!!python/x: y"]
NUMBERS += ["0x" + "f" * 5000]
ANCHORS = ["&a [*a]", "&a {b: *a}", "*a", "*nope", "<<: *a", "<<: [1]", "<<", "? [a]: b", "? {a: b}", "[]", "{}"]
SIGNS = [
    '"\\ud800"',
    '"\\0"',
    "'",
    '"',
    "|",
    ">",
    "%TAG",
    "---",
    "...",
    "\t",
    "\x85",
    "\u2028",
    "\ufeff",
    "é",
    "- ",
    ": ",
]
TOKENS = st.sampled_from([*SCALARS, *NUMBERS, *ANCHORS, *SIGNS, "name", "views:"])


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """Draw a valid file with some words or bytes replaced."""
    text = GOOD
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        if draw(st.booleans()):
            words = [place for place, letter in enumerate(text) if letter in " [{,:"] or [0]
            at = draw(st.sampled_from(words)) + 1
        text = text[:at] + draw(TOKENS | st.text(max_size=4)) + text[at + draw(st.integers(0, 12)) :]
    data = text.encode(errors="surrogatepass")
    return data if draw(st.integers(0, 4)) else data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=3))


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        views = load_views(path)
    except DefinitionError as error:
        message = str(error)
        if str(path) not in message:
            raise AssertionError(f"{path} is not named") from error
        message.encode()
    else:
        for view in views.views:
            view.schema.model_dump_json()


@fuzzed
@given(
    content=bent() | st.binary(max_size=30) | st.lists(TOKENS, max_size=6).map(lambda words: " ".join(words).encode())
)
def test_any_file_defines_views_or_says_what_is_wrong(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "views.yaml", content)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "- " * 5_000,
        "{a: " * 5_000,
        "views: &a [*a]",
        "&a {views: *a}",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12))
        + "views: [*m]\n",
        "a: &a {x0: 1}\n"
        + "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]}}\n" for n in range(12)),
        "views: " + "9" * 100_000,
        "views: 2026-99-99",
        "? [a, b]\n: c",
    ],
    ids=[
        "deep",
        "deep lists",
        "deep objects",
        "itself",
        "itself in itself",
        "laughs",
        "merges",
        "digits",
        "date",
        "key",
    ],
)
def test_files_that_are_made_to_hang(tmp_path: Path, content: str) -> None:
    with pytest.raises(DefinitionError, match=r"views\.yaml"):
        load_views(_written(tmp_path, content))


def _written(directory: Path, content: str) -> Path:
    path = directory / "views.yaml"
    path.write_text(content)
    return path
