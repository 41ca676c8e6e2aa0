"""The router's options: each is declared once, and everything else is derived from the declaration.

options.py, reserved.py   the declarations: options that have an effect, and options that only the reference router has
option.py                 what a declaration holds
kinds.py, checks.py, units.py, urls.py   from text to typed values; ranges, addresses, units, worker URLs
keys.py                   API keys: their grammar and their files
small_files.py            reads files of keys, certificates and options, without waiting
table.py                  all options by name
sources.py, flags.py      environment, files, command line
compat.py                 the defaults of other routers
args.py                   RouterArgs, the typed result
page.py                   docs/options.md
"""

from sglang_router.config.args import RouterArgs, parse
from sglang_router.config.flags import HelpFormatter
from sglang_router.config.option import Alias, Option
from sglang_router.config.options import POLICY_NAMES
from sglang_router.config.page import as_flag, markdown
from sglang_router.config.table import ALIASES, OPTIONS
from sglang_router.config.urls import parse_worker_url

__all__ = [
    "ALIASES",
    "OPTIONS",
    "POLICY_NAMES",
    "Alias",
    "HelpFormatter",
    "Option",
    "RouterArgs",
    "as_flag",
    "markdown",
    "parse",
    "parse_worker_url",
]
