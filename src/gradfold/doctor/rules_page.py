"""The page of rules, docs/doctor-rules.md, made from the rules themselves."""

from __future__ import annotations

from gradfold.doctor.rules import RULES
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_HEAD = """# What the doctor looks for

`gradfold doctor train.py -- ARGS` runs a training script unchanged for a few updates, and looks for these. Every
finding has a line of the script, says what was measured, and what to write instead. A comment
`# gradfold: ignore[GF012]` at the end of a line silences a rule there.

*error*: the gradient is not the one that was meant. *warning*: the model trains in another way than the code looks
like. *note*: right, at a needless cost. *certain*: it was seen; *likely*: what was seen has hardly another meaning.

This page is made from the rules (`gradfold doctor --rules` prints it).
"""


def rules_page() -> str:
    """The page, as Markdown."""
    rows = [f"| [{one.code}](#{one.code.lower()}) | {one.name} | {one.severity} |" for one in RULES]
    table = "\n".join(["| code | name | severity |", "|---|---|---|", *rows])
    return "\n".join([_HEAD, table, "", *map(_section, RULES)]).rstrip() + "\n"


def _section(rule: Rule) -> str:
    return f"""## {rule.code}

**{rule.name[0].upper()}{rule.name[1:]}** ({rule.severity}). {rule.what}

*Why it matters.* {rule.why}

*How it is found.* {rule.detection}

*Limits.* {rule.limits}

```py
# wrong
{rule.wrong.strip()}

# right
{rule.right.strip()}
```
"""
