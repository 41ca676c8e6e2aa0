"""The manual page, made of the tables that the program itself reads: docs/sglang-router.1.

    python -m sglang_router.commands.manual > docs/sglang-router.1      a test holds the two equal

A wheel installs it, so that `man sglang-router` finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Final

from sglang_router.commands.asking import KEY_VARIABLE, STATUSES, URL_VARIABLE
from sglang_router.config.flags import default_text
from sglang_router.config.option import ENVIRONMENT_PREFIX, Option
from sglang_router.config.table import OPTIONS
from sglang_router.version import __version__

COMMANDS: Mapping[str, str] = {
    "launch": "Start the router in front of engines that run already. The word may be left out before options.",
    "serve": "Start engines and the router in front of them, as one OpenAI server.",
    "epp": "Start the router as the endpoint picker of a gateway, over gRPC, beside its own port.",
    "engine": "Start the built-in engine, which simulates an SGLang server and needs no GPU.",
    "status": "Show whether the router is ready, and what is wrong.",
    "workers": "Show all workers, with state, load and the reason of what is wrong.",
    "top": "Watch workers, requests per second, time to first byte and cached share.",
    "drain WORKER": "Send a worker no new requests; --wait waits until none is in flight.",
    "resume WORKER": "End the drain of a worker.",
    "add URL": "Register a worker; --wait waits until it is healthy.",
    "remove WORKER": "Remove a worker; --wait drains it first.",
    "restart WORKER": "Restart an engine that `serve` runs; --all restarts all, one after the other.",
    "config": "Show the options in effect and where each value comes from.",
    "reload": "Let the router read its configuration again.",
    "check-config FILE": "Check a configuration with all that it names, and start nothing.",
    "explain ID": "Show why a request got its worker.",
    "replay": "Compare routing policies on a recorded or generated load, in virtual time.",
    "completion SHELL": "Print what completes the command in bash or zsh.",
}
"""All commands, in the order in which help and the manual show them."""

OPERATING: Final = ("status", "workers", "drain", "resume", "add", "remove", "restart", "config", "reload")
"""Those of `commands.operating`, whose module is only loaded for one of them."""


def page() -> str:
    """Return the manual page, in the language of man(7)."""
    return "".join(f"{each}\n" for each in _lines())


def _lines() -> Iterator[str]:
    yield f'.TH SGLANG-ROUTER 1 "" "sglang-router {__version__}" "User commands"'
    yield from (".SH NAME", r"sglang\-router \- a cache-aware router for fleets of LLM engines")
    yield ".SH SYNOPSIS"
    yield from (r".B sglang\-router", r"[\fICOMMAND\fR] [\fIoptions\fR]")
    yield ".SH DESCRIPTION"
    yield "Sends each request to the engine whose KV cache already holds the longest prefix of the prompt, chooses"
    yield "another one when that engine is overloaded, and survives engines that die."
    yield ".SH COMMANDS"
    for name, about in COMMANDS.items():
        yield from (".TP", f".B {_text(name)}", _text(about))
    yield ".P"
    yield _text(f"Commands that ask a running router take --url (or {URL_VARIABLE}; http://127.0.0.1:30000), --api-key")
    yield _text(f"(or {KEY_VARIABLE}), --ca-cert and --json.")
    yield ".SH OPTIONS"
    yield _text(f"Of `launch`. Each is also a variable {ENVIRONMENT_PREFIX}<NAME> and a key of the --config file.")
    group = ""
    for option in OPTIONS.values():
        if option.status != "implemented":
            continue
        if option.group != group:
            group = option.group
            yield f".SS {_text(group)}"
        yield from _option(option)
    yield ".SH EXIT STATUS"
    yield _text(f"Of commands that ask a router: {STATUSES.partition(': ')[2]}.")
    yield ".SH SIGNALS"
    yield _text(
        "SIGTERM and SIGINT stop the router in order, SIGHUP lets it read its configuration again, SIGUSR1 opens"
    )
    yield "the log files again."


def _option(option: Option) -> Iterator[str]:
    value = "" if option.kind.nargs == 0 else f" \\fI{_text(option.metavar or option.kind.metavar or 'VALUE')}\\fR"
    notes = f" One of {', '.join(option.choices)}." if option.choices else ""
    yield from (
        ".TP",
        f"\\fB{_text(option.flag)}\\fR{value}",
        _text(f"{option.help}{notes} Default: {default_text(option)}."),
    )


def _text(text: str) -> str:
    """Return a text as roff shows it unchanged."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


if __name__ == "__main__":
    sys.stdout.write(page())
