"""YAML as plain data within bounds: no text of a few lines takes the memory of a machine or a minute to read."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 1 << 17
"""Characters of a text, and of the values that it stands for once every alias is written out."""
LONGEST_NUMBER = 100
"""Characters of a whole number."""
DEEPEST = 50
"""Lists and mappings inside one another."""


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, whatever the text."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it is longer than {LARGEST:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, LookupError, AttributeError) as error:
        # What the constructors of 2001-02-30, 0x_ or `!!int x` let through.
        raise yaml.YAMLError(f"a value is not what it looks like or is tagged as ({error})") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Counts before anything is built, an alias as all that it stands for; refuses a key that stands twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._size = 0
        self._depth = 0
        self._height = 0
        """Of the highest node so far within the one being read."""
        self._measures: dict[int, tuple[int, int]] = {}
        """Size and height by the identity of the node, which the graph of nodes keeps alive."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        start: Any = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        size, height = self._size, self._height
        self._depth, self._height = self._depth + 1, 0
        _refuse(self._depth > DEEPEST, f"it is nested deeper than {DEEPEST} levels", start)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            _refuse(id(node) not in self._measures, "an alias stands inside what it stands for", start)
            added, own = self._measures[id(node)]
            self._size += added
        else:
            self._size += 1 + (_scalar_length(node) if isinstance(node, yaml.ScalarNode) else 0)
            own = self._height + 1
            self._measures[id(node)] = self._size - size, own
        _refuse(self._depth + own > DEEPEST, f"its aliases nest deeper than {DEEPEST} levels", start)
        _refuse(self._size > LARGEST, f"its aliases stand for more than {LARGEST:,} characters", start)
        self._height = max(height, own)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                _refuse(key.value in seen, f"the key '{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return node


def _scalar_length(node: yaml.ScalarNode) -> int:
    length = len(node.value)
    is_number = node.tag == "tag:yaml.org,2002:int"
    _refuse(is_number and length > LONGEST_NUMBER, f"a whole number of {length:,} characters", node.start_mark)
    return length


def _refuse(wrong: bool, problem: str, mark: Any) -> None:
    if wrong:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
