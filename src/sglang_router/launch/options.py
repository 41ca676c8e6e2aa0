"""The options of `launch_server`: its own, the router's, and the engine's.

    --backend vllm --dp-size 4   --port 8000 --router-policy random   --tp-size 2 --seed 7 -- --log-dir x
    LaunchOptions                RouterArgs                           the engine's: all others, in order

The router's flags have the prefix `--router-`, except `--host`, `--port` and `--worker-urls`. All flags that neither
the launcher nor the router knows go to the engine unchecked; only an unknown `--router-...` is an error. All words
after `--` go to the engine, even if they are flags of the launcher or the router.

    python -m sglang_router.launch.options --markdown     the tables of docs/launch.md
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_router.config import RouterArgs
from sglang_router.config.checks import above, address, at_least, between
from sglang_router.config.flags import HelpFormatter, OptionParser, add_version
from sglang_router.config.flags import add_flags as add_table
from sglang_router.config.option import alias, option
from sglang_router.config.page import sections
from sglang_router.config.table import OptionTable
from sglang_router.errors import ConfigError

# The keys of `launch.backends.BACKENDS`, which --help need not import. A test holds the two equal.
BACKEND_NAMES = ("sglang", "vllm", "llamacpp", "builtin")
_WITHOUT_GPU = ("llamacpp", "builtin")  # by default two replicas of these are started, so that there is a choice

ENGINES = "Engines"
SUPERVISION = "Supervision"

_SPELLINGS = {"-h": "--help", "-dp": "--dp"}  # not declared as flags: argparse would read the engine's -hf as -h


@dataclass
class LaunchOptions:
    """The launcher's own options."""

    backend: str = option("sglang", "Which engine to start.", ENGINES, choices=BACKEND_NAMES)
    model_path: str | None = option(
        None,
        "The model: a folder or a name on Hugging Face. For llamacpp: a .gguf file; without one, a small model is"
        " downloaded. For builtin: the model name that the engine reports.",
        ENGINES,
        metavar="MODEL",
    )
    dp_size: int | None = option(
        None,
        "How many replicas of the engine to start, each with its own GPUs.",
        ENGINES,
        check=between(1, 1024),
        shown_default="1; 2 for llamacpp and builtin",
    )
    router_dp_worker_base_port: int = option(
        31000,
        "Port of the first replica; each further replica gets the next free port.",
        ENGINES,
        check=between(1, 65535),
    )
    dp_worker_host: str = option(
        "127.0.0.1",
        "Address on which the replicas listen; a loopback address keeps other machines out.",
        ENGINES,
        check=address,
    )
    engine_python: str | None = option(
        None,
        "Python interpreter of the environment in which sglang or vllm is installed, if it is not the router's own.",
        ENGINES,
        metavar="FILE",
        shown_default="the router's own",
    )
    log_dir: str | None = option(
        None,
        "Folder for the engines' output, one file rank-N.log each; the router logs there too. Without it, the engines'"
        " lines go to standard error, with the rank in front.",
        ENGINES,
        metavar="DIR",
    )
    router_max_restarts: int = option(
        5,
        "Most restarts of a replica within --router-restart-window-secs; after that it stays down.",
        SUPERVISION,
        check=at_least(0),
    )
    router_restart_window_secs: float = option(
        600, "Window in which restarts are counted.", SUPERVISION, unit="s", check=above(0)
    )
    router_restart_initial_backoff_secs: float = option(
        1, "Pause before the first restart; it doubles with each further one.", SUPERVISION, unit="s", check=at_least(0)
    )
    router_restart_max_backoff_secs: float = option(
        60, "Longest pause before a restart.", SUPERVISION, unit="s", check=at_least(0)
    )
    router_hang_timeout_secs: float = option(
        60,
        "Kill and restart a replica that has failed its health checks for this long and answered no request meanwhile.",
        SUPERVISION,
        unit="s",
        check=above(0),
    )
    router_drain_timeout_secs: float = option(
        180,
        "How long to wait for a replica's requests to finish before it is restarted or scaled down.",
        SUPERVISION,
        unit="s",
        check=at_least(0),
    )
    router_stop_grace_secs: float = option(
        10,
        "How long to wait for an engine to end after SIGTERM; then SIGKILL.",
        SUPERVISION,
        unit="s",
        check=at_least(0),
    )

    # the engines' names for these options
    dp: int | None = alias("dp_size")
    data_parallel_size: int | None = alias("dp_size")
    model: str | None = alias("model_path")

    @property
    def size(self) -> int:
        """How many replicas to start."""
        return self.dp_size or (2 if self.backend in _WITHOUT_GPU else 1)


LAUNCH = OptionTable(LaunchOptions, given="launch_flags_given")


class CommandLine(NamedTuple):
    """One command line, split by receiver. `engine` holds the engine's words unchanged."""

    options: LaunchOptions
    router: RouterArgs
    engine: tuple[str, ...]


def parse(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = "sglang-router serve"
) -> CommandLine:
    """Split a command line (without the program's name). The environment and a file set options of the router only.

    Raises: ConfigError; SystemExit(0) after --help.
    """
    own, engines = _cut(list(argv))
    parser = new_parser(prog)
    namespace, rest = parser.parse_known_args(own)
    for word in rest:
        if word.startswith(("--router-", "--router_")):
            raise parser.unknown(word)
    given = {name: getattr(namespace, name) for name in getattr(namespace, LAUNCH.given)}
    options = LaunchOptions(**LAUNCH.resolve_aliases(given, "command line"))
    if options.router_restart_max_backoff_secs < options.router_restart_initial_backoff_secs:
        raise ConfigError(
            "--router-restart-max-backoff-secs must not be less than --router-restart-initial-backoff-secs"
        )
    router = RouterArgs.from_cli_args(namespace, use_router_prefix=True, environ=environ)
    router.log_dir = router.log_dir or options.log_dir
    return CommandLine(options, router, (*rest, *engines))


def _cut(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--`, and those after it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_SPELLINGS.get(word, word) for word in argv[:end]], argv[end + 1 :]


def new_parser(prog: str) -> OptionParser:
    """Return the parser of the command line."""
    parser = OptionParser(
        prog=prog,
        usage="%(prog)s [--backend NAME] --model-path MODEL [--dp-size N] [--host HOST] [--port PORT]\n"
        "       [--router-... options of the router] [options of the engine]",
        description="Start replicas of an engine and the router in front of them, as one OpenAI server.\n"
        "Every flag that is not listed here goes unchanged to each engine; so do all words after `--`.",
        epilog="The router's options, in the groups from Workers on, are also variables SGLANG_ROUTER_<NAME>\n"
        "and keys of the file given with --router-config.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", action="help", help="show this text (also -h)")
    add_version(parser)
    add_table(parser, LAUNCH)
    RouterArgs.add_cli_args(parser, use_router_prefix=True)
    return parser


def markdown() -> str:
    """Return the tables of the launcher's own options, one section per group."""
    return "".join(sections(LAUNCH, LAUNCH.options.values())).replace("\n## ", "\n### ").lstrip("\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.launch.options --markdown")
    sys.stdout.write(markdown())
