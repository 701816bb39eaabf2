"""cosyvoice3.yaml as plain data.

The file is written for hyperpyyaml, whose tags construct objects and call functions. Here a tag is never
executed: `!new:X {..}`, `!name:X {..}` and `!apply:X [..]` leave their arguments as plain mappings and lists,
and `!ref <a> * <b>` is looked up, products included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


@dataclass(frozen=True)
class _Reference:
    expression: str


class _PlainLoader(yaml.SafeLoader):
    pass


def _construct_tagged(loader: _PlainLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    value = loader.construct_scalar(node)  # type: ignore[arg-type]
    return _Reference(value) if suffix == "ref" else value


_PlainLoader.add_multi_constructor("!", _construct_tagged)


def load(text: str) -> dict[str, Any]:
    """Parse the file, references unresolved.

    Raises:
        ValueError: it is not YAML, or not a mapping.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} characters; a model description has a few thousand")
    try:
        data = yaml.load(text, _PlainLoader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError("expected a mapping at the top")
    return data


def lookup(data: dict[str, Any], path: str) -> Any:
    """The value at a dotted `path`, references followed.

    Raises:
        KeyError: there is none; the message names the path.
        ValueError: a reference cannot be followed.
    """
    value: Any = data
    for depth, key in enumerate(path.split(".")):
        value = _resolve(value, data, 0)
        if not isinstance(value, dict) or key not in value:
            raise KeyError(".".join(path.split(".")[: depth + 1]))
        value = value[key]
    return _resolve(value, data, 0)


def _resolve(value: Any, data: dict[str, Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("references form a circle")
    if isinstance(value, list):
        return [_resolve(item, data, depth + 1) for item in value]
    if not isinstance(value, _Reference):
        return value
    product: Any = None
    for factor in value.expression.split("*"):
        found = re.fullmatch(r"<(\w+)>|(-?\d+(?:\.\d+)?)", factor.strip())
        if not found:
            raise ValueError(f"cannot read the reference {value.expression!r}")
        name, number = found.groups()
        if name is not None:
            if name not in data:
                raise ValueError(f"reference to {name!r}, which the file does not define")
            item = _resolve(data[name], data, depth + 1)
        else:
            item = float(number) if "." in number else int(number)
        if product is None:
            product = item
        elif isinstance(product, (int, float)) and isinstance(item, (int, float)):
            product = product * item
        else:
            raise ValueError(f"cannot multiply in {value.expression!r}")
    return product
