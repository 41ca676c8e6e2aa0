"""What the router can be told: every option declared once, everything else derived from that line.

options.py, reserved.py   the declarations: what works, and what the reference has and this router has not
option.py                 what a declaration says
kinds.py, checks.py, urls.py   from text to typed values; ranges, addresses, worker URLs
table.py                  all options by name
sources.py, flags.py      environment, files, command line
args.py                   RouterArgs, the typed result
page.py                   docs/options.md
"""

from sglang_router.config.args import RouterArgs, parse
from sglang_router.config.flags import HelpFormatter
from sglang_router.config.option import Alias, Option
from sglang_router.config.options import POLICY_NAMES
from sglang_router.config.page import markdown
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
    "markdown",
    "parse",
    "parse_worker_url",
]
