"""Machine code on disk is used only for the sources that it was compiled from."""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba.core import config
from numba.core.dispatcher import Dispatcher

from shoal.engine.kernels import compiling, fingerprint

PROJECT = Path(compiling.__file__).parents[3]

SOURCES = {
    "constants": """
from enum import IntEnum
import numpy as np

UNIT = 8
WIDTH = 2 * UNIT
SIGN = 1.0
PAIR = (3, (5, 7))
TABLE = np.array([11, 13])
SCALAR = np.uint8(17)

class Kind(IntEnum):
    SMALL = 19
""",
    "functions": """
from numba import njit, types
from numba.extending import intrinsic
from shoal.engine.kernels.compiling import kernel
from constants import WIDTH

def adder(number):
    @intrinsic
    def add(typing_context, value):
        def codegen(context, builder, signature, args):
            return builder.add(args[0], args[0].type(number))
        return types.int64(types.int64), codegen
    return add

add_one = adder(100)
add_two = adder(200)

@njit(inline="always")
def inlined(value, scale=23):
    return value * WIDTH + scale

@kernel
def called(value):
    return inlined(value) + 29
""",
    "kernels": """
import constants
from constants import PAIR, SIGN, TABLE, Kind
from shoal.engine.kernels.compiling import kernel
from functions import add_one, add_two, called

@kernel
def answer(value):
    total = called(value) + PAIR[1][0] + TABLE[1] + Kind.SMALL + constants.SCALAR
    return total + 1000 * add_one(value) - add_two(value) + int(SIGN > 0)
""",
}
EDITS = {
    "a constant of another module": ("constants", "WIDTH = 2 * UNIT", "WIDTH = 3 * UNIT"),
    "what that constant is made from": ("constants", "UNIT = 8", "UNIT = 9"),
    "a float": ("constants", "SIGN = 1.0", "SIGN = -1."),
    "a number in a tuple in a tuple": ("constants", "(5, 7)", "(6, 7)"),
    "a number in an array": ("constants", "[11, 13]", "[11, 14]"),
    "a constant that is named by its module": ("constants", "np.uint8(17)", "np.uint8(18)"),
    "a member of an enumeration": ("constants", "SMALL = 19", "SMALL = 20"),
    "an inlined function": ("functions", "value * WIDTH", "value - WIDTH"),
    "a default value of it": ("functions", "scale=23", "scale=24"),
    "a kernel that is called": ("functions", "+ 29", "- 29"),
    "a number that an intrinsic closes over": ("functions", "adder(100)", "adder(101)"),
    "which intrinsic is which": ("functions", "add_one = adder(100)\nadd_two", "add_two = adder(100)\nadd_one"),
    "the code of an intrinsic": ("functions", "builder.add(", "builder.mul("),
    "the kernel itself": ("kernels", "+ 1000 *", "+ 1001 *"),
}


def modules(sources: dict[str, str]) -> dict[str, ModuleType]:
    """Execute the sources as modules, as a new process would do, and return the modules."""
    made = {name: ModuleType(name) for name in sources}
    before = {name: sys.modules.get(name) for name in sources}
    sys.modules.update(made)
    try:
        for name, text in sources.items():
            exec(compile(text, f"{name}.py", "exec"), vars(made[name]))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return made


def answer_of(sources: dict[str, str]) -> Any:
    return modules(sources)["kernels"].answer


def edited(module: str, before: str, after: str) -> dict[str, str]:
    assert SOURCES[module].count(before) == 1
    return SOURCES | {module: SOURCES[module].replace(before, after)}


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the machine code of `SOURCES`."""
    directory = tmp_path_factory.mktemp("machine-code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CACHE_DIR", str(directory))
        answer_of(SOURCES)(2)
    return directory


@pytest.fixture
def directory(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `compiled` for one test, in the only place where kernels look for machine code."""
    shutil.copytree(compiled, tmp_path / "machine-code")
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "machine-code"))
    return tmp_path / "machine-code" / "shoal"


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_no_machine_code_is_used_once_what_it_was_made_from_changed(edit: tuple[str, str, str]) -> None:
    before = answer_of(SOURCES)
    after = answer_of(edited(*edit))
    value_before = before(2)
    value_after = after(2)
    assert (hits(before), hits(after)) == (1, 0)
    assert value_before != value_after
    again = answer_of(edited(*edit))
    assert again(2) == value_after
    assert hits(again) == 1


def test_machine_code_stays_in_use_if_only_a_docstring_changed() -> None:
    def documented(docstring: str) -> str:
        added = f'(value):\n    """{docstring}"""\n'
        return fingerprint.fingerprint(
            answer_of({name: text.replace("(value):\n", added) for name, text in SOURCES.items()})
        )

    assert documented("What it does.") == documented("Return an answer.")


def test_two_releases_run_side_by_side(directory: Path) -> None:
    other = edited("constants", "UNIT = 8", "UNIT = 9")
    answer_of(other)(2)
    kept = set(os.listdir(directory))
    for sources in (SOURCES, other):
        answer = answer_of(sources)
        answer(2)
        assert hits(answer) == 1
    assert set(os.listdir(directory)) == kept


@pytest.mark.usefixtures("directory")
def test_another_release_of_numba_or_python_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numba", "llvmlite", "numpy"):
        assert f"{name} {sys.modules[name].__version__}" in fingerprint.VERSIONS
    assert sys.version in fingerprint.VERSIONS
    monkeypatch.setattr(fingerprint, "VERSIONS", "another")
    answer = answer_of(SOURCES)
    answer(2)
    assert hits(answer) == 0


@pytest.mark.usefixtures("directory")
def test_each_signature_has_its_own_machine_code() -> None:
    for _ in range(2):
        answer = answer_of(SOURCES)
        assert answer(2) == answer(np.int8(2))
    assert hits(answer) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, b"short", None], ids=["empty", "zeros", "short", "cut"])
def test_a_damaged_file_is_compiled_anew_and_replaced(directory: Path, damage: bytes | None) -> None:
    for path in directory.iterdir():
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    expected = []
    for found in (0, 1):
        answer = answer_of(SOURCES)
        expected.append(answer(2))
        assert hits(answer) == found
    assert expected[0] == expected[1]


def test_a_directory_that_cannot_be_written_to_is_read_and_the_next_is_written_to(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing can be created below a file, not even by root.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(compiling, "__file__", str(directory.parent / "compiling.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "shoal").mkdir(parents=True)
    directory.rename(tmp_path / "home" / "shoal" / "kernels")
    answer = answer_of(SOURCES)
    answer(2)
    assert hits(answer) == 1

    other = edited("constants", "UNIT = 8", "UNIT = 9")
    answer_of(other)(2)
    assert {path.name.partition("-")[0] for path in (directory.parent / "__pycache__").iterdir()} == {
        "functions.called",
        "kernels.answer",
    }
    answer = answer_of(other)
    answer(2)
    assert hits(answer) == 1
    assert not caplog.records


def test_kernels_work_where_nothing_can_be_written_and_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place in ("one", "two"):
        monkeypatch.setattr(config, "CACHE_DIR", str(file / place))
    monkeypatch.setattr(compiling, "__file__", str(file / "compiling.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    # A directory that others can write to is not used, because the code in it would be run.
    own = tmp_path / f"shoal-kernels-{os.geteuid()}"
    own.mkdir()
    own.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert answer_of(SOURCES)(2) == answer_of(SOURCES)(2)
    assert not list(own.iterdir())
    own.rmdir()
    answer_of(SOURCES)(2)
    assert list(own.iterdir())
    assert own.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def test_files_that_are_not_used_do_not_pile_up(directory: Path) -> None:
    used = set(os.listdir(directory))
    long_ago = time.time() - 3600
    for number in range(600):
        (directory / f"removed.function-{number}.kernel").write_bytes(b"")
        os.utime(directory / f"removed.function-{number}.kernel", (long_ago + number, long_ago + number))
    for name in used:
        os.utime(directory / name, (0, 0))
    answer_of(SOURCES)(2)
    answer_of(edited("kernels", "+ 1000 *", "+ 1001 *"))(2)
    left = set(os.listdir(directory))
    assert len(left) == 512
    assert used <= left
    assert "removed.function-599.kernel" in left


def test_a_kernel_that_refers_to_what_cannot_be_followed_is_refused() -> None:
    sources = SOURCES | {"constants": f"{SOURCES['constants']}\nWIDTH = {{1: 2}}\n"}
    with pytest.raises(TypeError, match=r"functions\.inlined refers to \{1: 2\}, a dict"):
        fingerprint.fingerprint(answer_of(sources))


def test_every_kernel_of_shoal_is_known_by_its_fingerprint() -> None:
    paths = [path for package in ("engine", "loaders") for path in (PROJECT / package).rglob("*.py")]
    texts = {path: path.read_text() for path in paths}
    assert not [path for path, text in texts.items() if re.search(r"\bcache=True", text)]
    decorated = [path for path, text in texts.items() if re.search(r"^@kernel$", text, re.MULTILINE)]
    prints = set()
    for path in decorated:
        module = import_module(".".join(("shoal", *path.relative_to(PROJECT).with_suffix("").parts)))
        own = [each for each in vars(module).values() if isinstance(each, Dispatcher)]
        own = [
            each for each in own if each.py_func.__module__ == module.__name__ and "inline" not in each.targetoptions
        ]
        assert len(own) == texts[path].count("\n@kernel\n")
        prints |= {fingerprint.fingerprint(each) for each in own}
    assert len(prints) == sum(texts[path].count("\n@kernel\n") for path in decorated)
    assert len(prints) > 30


LAYOUT = """
import numpy as np
from shoal.engine.kernels.memory import address_of
from shoal.engine.format.layout import ROW_SECOND_HASH
from shoal.loaders.apply.retention import second_hashes

row, found = np.arange(4), np.empty(1, np.int64)
second_hashes(np.array([address_of(row)]), found)
print(ROW_SECOND_HASH, found[0], sum(second_hashes.stats.cache_hits.values()))
"""


def test_another_layout_is_read_as_it_is_though_its_file_looks_the_same(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "shoal", tmp_path / "shoal", ignore=shutil.ignore_patterns("__pycache__"))
    layout = tmp_path / "shoal" / "engine" / "format" / "layout.py"
    source = layout.read_text()
    status = layout.stat()
    # Without bytecode files: Python, too, identifies their sources only by size and time.
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": ""}

    def output() -> str:
        command = [sys.executable, "-c", LAYOUT]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True, timeout=120).strip()

    assert output() == "0 0 0"
    changed = source.replace("ROW_SECOND_HASH = 0", "ROW_SECOND_HASH = 8")
    assert changed != source
    layout.write_text(changed)
    os.utime(layout, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert output() == "8 1 0"
    layout.write_text(source)
    assert output() == "0 0 1"
