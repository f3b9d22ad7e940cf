"""A YAML file that remembers its lines, so that an error found later can name the one it is about."""

from pathlib import Path
from typing import Any

import yaml

from engine.errors import DefinitionError

Place = tuple[str | int, ...]
"""Where a value stands in a document: the mapping keys and list positions that lead to it."""


class YamlDocument:
    """One YAML file: its content as plain Python values in `data`, and the line of each of them."""

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            DefinitionError: it cannot be read, is not YAML, is empty, or names a key twice.
        """
        self.path = path
        try:
            loader = yaml.SafeLoader(path.read_bytes())
        except OSError as error:
            raise DefinitionError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from None
        except yaml.YAMLError as error:
            raise DefinitionError(f"{path} is not UTF-8 text: {error}") from None
        try:
            root = loader.get_single_node()
            if root is None:
                raise DefinitionError(f"{path} is empty; it must define views")
            self._root: yaml.Node = root
            self._check_keys_are_distinct(self._root, set())
            self.data: Any = loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise DefinitionError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise DefinitionError(f"{path} is not valid YAML: {error}") from None
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

    def _check_keys_are_distinct(self, node: yaml.Node, visited: set[int]) -> None:
        if id(node) in visited:
            return
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._check_keys_are_distinct(item, visited)
        if isinstance(node, yaml.MappingNode):
            first_lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in first_lines:
                        raise DefinitionError(
                            f"{self.path}:{line}: the key {key.value!r} is given twice, first in line "
                            f"{first_lines[key.value]}; remove one"
                        )
                    first_lines[key.value] = line
                self._check_keys_are_distinct(value, visited)
