"""A YAML file that remembers its lines, so that an error found later can name the one it is about."""

import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import DefinitionError

Place = tuple[str | int, ...]
"""Where a value stands in a document: the mapping keys and list positions that lead to it."""


_MOST_VALUES = 1_000_000
"""A file may hold so many values, each counted as often as aliases repeat it: ten lines can stand for billions."""


_LAST_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_BRACKETS = re.compile(r"\[[^][{}\0]{0,40}\]")


class _Loader(yaml.SafeLoader):
    """PyYAML's, which says of each value that it cannot read where it is."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # A hexadecimal number may be too long to be told, and Python then raises ValueError.
            return value
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"what stands here is no {kind}; put it in quotes if it is a text", node.start_mark
            ) from None


class YamlDocument:
    """One YAML file: its content as plain Python values in `data`, and the line of each of them."""

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            DefinitionError: it cannot be read, is not YAML, is empty, names a key twice, or is nested without end.
        """
        self.path = path
        try:
            loader = _Loader(path.read_bytes())
        except OSError as error:
            raise DefinitionError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from None
        except yaml.YAMLError as error:
            raise DefinitionError(f"{path} is not UTF-8 text: {error}") from None
        try:
            root = loader.get_single_node()
            if root is None:
                raise DefinitionError(f"{path} is empty; it must define views")
            self._root: yaml.Node = root
            self._check(self._root, {})
            self.data: Any = loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise DefinitionError(
                f"{path}:{line}: not valid YAML: {error.problem or error.context}{_mend(mark)}"
            ) from None
        except yaml.YAMLError as error:
            raise DefinitionError(f"{path} is not valid YAML: {error}") from None
        except RecursionError:
            raise DefinitionError(f"{path} is nested too deeply; views need no more than ten levels") from None
        finally:
            loader.dispose()

    def line(self, place: Place) -> int:
        """The line, counted from 1, of the value at `place`, or of the closest value around it that exists."""
        node, line = self._root, self._root.start_mark.line
        for step in place:
            if isinstance(node, yaml.MappingNode):
                # A merge (<<) puts the merged pairs in front, where the mapping's own override them.
                found = [pair for pair in node.value if pair[0].value == step]
                if not found:
                    break
                key, node = found[-1]
                line = key.start_mark.line
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line
            else:
                break
        return int(line) + 1

    def _check(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Check that keys are distinct, that nothing holds itself, and that all is not too large.

        Args:
            sizes: how many values each node stands for, by its id; none yet for those around this one.

        Returns:
            How many values this one stands for.
        """
        line = node.start_mark.line + 1
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise DefinitionError(f"{self.path}:{line}: the value here holds itself, by an alias; write it out")
            return sizes[id(node)]
        sizes[id(node)] = 0
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(self._check(item, sizes) for item in node.value)
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            size += sum(self._check(key, sizes) + self._check(value, sizes) for key, value in node.value)
        if size > _MOST_VALUES:
            raise DefinitionError(
                f"{self.path}:{line}: what stands here is {size} values with its aliases, a file has at most "
                f"{_MOST_VALUES}; write less"
            )
        sizes[id(node)] = size
        return size

    def _check_keys(self, node: yaml.MappingNode) -> None:
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first_lines:
                    raise DefinitionError(
                        f"{self.path}:{line}: the key {key.value!r} is given twice, first in line "
                        f"{first_lines[key.value]}; remove one"
                    )
                first_lines[key.value] = line


def _mend(mark: yaml.Mark | None) -> str:
    """Return what to do about invalid YAML, if the cause is known."""
    if mark is None or mark.buffer is None:
        return ""
    before, after = mark.buffer[: mark.pointer].rpartition("\n")[2], mark.buffer[mark.pointer :].partition("\n")[0]
    if after.startswith("\t"):
        return "; indent with spaces: YAML takes no tabs"
    word, rest = _LAST_WORD.search(before), _BRACKETS.match(after)
    if word and rest:
        return f'; inside braces a text with brackets needs quotes: "{word[0]}{rest[0]}"'
    return ""
