"""`docs/options.md`, made from the table of options. A test holds the file and this function's text equal."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_router.config.checks import Range
from sglang_router.config.flags import default_text
from sglang_router.config.option import ENVIRONMENT_PREFIX, Option
from sglang_router.config.table import OPTIONS, ROUTER, Table

_HEAD = f"""# Options

Made by `python -m sglang_router.config --markdown > docs/options.md`; do not edit by hand.

Each option is a flag of `sglang-router launch` (or `python -m sglang_router.launch_router`), a variable
`{ENVIRONMENT_PREFIX}<NAME>`, a key of the file given with `--config`, and a field of `RouterArgs`. Flags win
over the environment, the environment over the file, the file over the default. The file is YAML (`.yaml`,
`.yml`) or TOML (`.toml`), one flat mapping:

```yaml
worker-urls: [http://10.0.0.1:8000, http://10.0.0.2:8000]
policy: cache_aware
cache-threshold: 0.4
```

In a variable, members of a list are separated by spaces or commas; a switch is `true` or `false`; an empty
variable is as good as none. A bad value, an unknown flag or key, or a file that cannot be read ends the
command with one line on standard error and exit status 2.
"""

_LATER = """
## Not available yet

Flags of the reference router (0.3.2) whose features are still to come. They are understood, and refused at
the start when set to anything but their defaults, because the router would otherwise not do what was asked.
"""

_INERT = """
## Accepted without effect

Flags of the reference router (0.3.2) for which an HTTP router has nothing to do. Setting them gives one
warning that names them.
"""


_TABLE_HEAD = "| flag | default | meaning |\n|---|---|---|\n"


def markdown() -> str:
    """The whole page."""
    parts = [_HEAD]
    implemented = [option for option in OPTIONS.values() if option.status == "implemented"]
    parts.extend(sections(ROUTER, implemented))
    for head, status in ((_LATER, "later"), (_INERT, "inert")):
        short = [_short_row(option) for option in OPTIONS.values() if option.status == status]
        parts.append(f"{head}\n{_TABLE_HEAD}" + "".join(short))
    return "".join(parts)


def sections(table: Table, options: Iterable[Option]) -> list[str]:
    """Options of `table` as Markdown: for each group a heading and a table."""
    groups: dict[str, list[str]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(_row(option, table))
    return [f"\n## {group}\n\n{_TABLE_HEAD}{''.join(rows)}" for group, rows in groups.items()]


def _row(option: Option, table: Table) -> str:
    notes = [option.help]
    if option.choices:
        notes.append("One of " + ", ".join(f"`{choice}`" for choice in option.choices) + ".")
    elif isinstance(option.check, Range):
        notes.append(f"{option.expects[0].upper()}{option.expects[1:]}.")
    if others := table.other_flags(option.name):
        notes.append("Also " + ", ".join(f"`{other}`" for other in others) + ".")
    return _cells(option, " ".join(notes))


def _short_row(option: Option) -> str:
    return _cells(option, option.help)


def _cells(option: Option, text: str) -> str:
    field = f" (field `{option.name}`)" if len(option.keys) > 1 else ""
    return f"| `{option.flag}`{field} | {default_text(option)} | {text} |\n".replace("<", "&lt;")
