"""JSON of dataclasses: fields and properties are written, fields are read back by their types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """The value in dicts, lists and scalars; a number that is not finite is null."""
    if is_dataclass(value):
        properties = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        names = [field.name for field in fields(value)] + properties
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Any, data: Any) -> Any:
    """A value of type `kind` from what `to_plain` made of it; a null in place of a number is NaN."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{field.name: from_plain(kinds[field.name], data[field.name]) for field in fields(kind)})  # type: ignore[operator]
    if NoneType in arguments:
        return None if data is None else from_plain(next(one for one in arguments if one is not NoneType), data)
    if get_origin(kind) is tuple:
        return tuple(from_plain(arguments[0], one) for one in data)
    if get_origin(kind) is Mapping:
        return {key: from_plain(arguments[1], one) for key, one in data.items()}
    if kind is float and data is None:
        return math.nan
    return Path(data) if kind is Path else data
