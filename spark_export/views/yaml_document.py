"""A parsed YAML file with the line number of each value, so that a later error can name its line."""

import re
from pathlib import Path
from typing import Any

import yaml

from shoal.engine.base.errors import DefinitionError

Place = tuple[str | int, ...]
"""The path of a value in a document: the mapping keys and list positions that lead to the value."""


_MOST_VALUES = 1_000_000
"""The greatest number of values in a file. A value counts once for each alias that repeats it, because with aliases ten
lines can expand to billions of values."""


_LAST_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_BRACKETS = re.compile(r"\[[^][{}\0]{0,40}\]")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with one addition: the error for an unreadable value names the value's line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # Python raises ValueError if a hexadecimal number is too long to be printed in decimal.
            return value
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this value is not a valid {kind}; put it in quotes if it is text", node.start_mark
            ) from None


class YamlDocument:
    """A YAML file: its contents as plain Python values in `data`, and the line number of each value."""

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            DefinitionError: the file cannot be read, is not YAML, is empty, has a duplicate key, is nested too deeply,
                has a value that contains itself, or has too many values.
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
        """Return the line number of the value at `place`, counted from 1. If the value does not exist, return the line
        of the innermost existing value around it."""
        node = self._root
        line = self._root.start_mark.line
        for step in place:
            if isinstance(node, yaml.MappingNode):
                # A merge (<<) puts the merged pairs first, so that the mapping's own pairs override them.
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
        """Check for duplicate keys, for values that contain themselves, and for too many values in the file.

        Args:
            sizes: the number of values in each node after expanding aliases, by the node's id; 0 for the nodes that
                enclose this one, because they are not yet counted.

        Returns:
            The number of values in this node after expanding aliases.

        Raises:
            DefinitionError: one of the checks failed.
        """
        line = node.start_mark.line + 1
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise DefinitionError(f"{self.path}:{line}: this value contains itself through an alias; write it out")
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
                f"{self.path}:{line}: with its aliases this value expands to {size} values, but a file may have at "
                f"most {_MOST_VALUES}; write fewer values"
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
    """Return the fix for invalid YAML as the end of an error message; an empty string if the cause is unknown."""
    if mark is None or mark.buffer is None:
        return ""
    before = mark.buffer[: mark.pointer].rpartition("\n")[2]
    after = mark.buffer[mark.pointer :].partition("\n")[0]
    if after.startswith("\t"):
        return "; indent with spaces: YAML does not allow tabs"
    word = _LAST_WORD.search(before)
    rest = _BRACKETS.match(after)
    if word and rest:
        return f'; inside braces a text with brackets needs quotes: "{word[0]}{rest[0]}"'
    return ""
