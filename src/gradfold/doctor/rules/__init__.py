"""The rules, in the order of their codes: each file here is one, as `rule` says."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from gradfold.doctor.rule import Rule

_FOUND = [Rule.of(import_module(f"{__name__}.{file.name}")) for file in iter_modules(__path__)]
RULES: tuple[Rule, ...] = tuple(sorted(_FOUND, key=lambda rule: rule.code))
