"""What `launch_server` can be told: its own options, the router's, and the engine's.

    --backend vllm --dp-size 4   --port 8000 --router-policy random   --tp-size 2 --seed 7 -- --log-dir x
    LaunchOptions                RouterArgs                           the engine's: what is left, in order

The router's flags carry the prefix `--router-`, but for `--host`, `--port` and `--worker-urls`. What neither knows
belongs to the engine and is not looked at, except that an unknown `--router-...` is a mistake. What follows a `--`
belongs to the engine even if its name is one of ours.

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
from sglang_router.config.flags import HelpFormatter, Parser
from sglang_router.config.flags import add_flags as add_table
from sglang_router.config.option import alias, option
from sglang_router.config.page import sections
from sglang_router.config.table import Table
from sglang_router.errors import ConfigError

# also the names in `launch.backends.BACKENDS`, which only a start needs; a test holds the two equal
BACKEND_NAMES = ("sglang", "vllm", "llamacpp", "builtin")
_MANY = ("llamacpp", "builtin")  # need no GPU each, so two are started to have something to route between

ENGINES = "Engines"
SUPERVISION = "Supervision"

_SPELLINGS = {"-h": "--help", "-dp": "--dp"}  # -h not as a flag of its own: argparse would take -hf for it


@dataclass
class LaunchOptions:
    """The launcher's own options."""

    backend: str = option("sglang", "Which engine to start.", ENGINES, choices=BACKEND_NAMES)
    model_path: str | None = option(
        None,
        "The model: a folder or a name on Hugging Face; for llamacpp a .gguf file, and without one a small model is"
        " fetched; for builtin the name it gives itself.",
        ENGINES,
        metavar="MODEL",
    )
    dp_size: int | None = option(
        None,
        "How many replicas of the engine to start, each with GPUs of its own.",
        ENGINES,
        check=between(1, 1024),
        shown_default="1; 2 for llamacpp and builtin",
    )
    router_dp_worker_base_port: int = option(
        31000,
        "Port of the first replica; each other one takes the next that is free.",
        ENGINES,
        check=between(1, 65535),
    )
    dp_worker_host: str = option(
        "127.0.0.1",
        "Address on which the replicas listen; loopback keeps them to this machine.",
        ENGINES,
        check=address,
    )
    engine_python: str | None = option(
        None,
        "Interpreter of the environment in which sglang or vllm is installed, if that is not the router's own.",
        ENGINES,
        metavar="FILE",
        shown_default="this one",
    )
    log_dir: str | None = option(
        None,
        "Folder for what the engines write, one file rank-N.log each; the router logs there too. Without it their"
        " lines go to standard error, with the rank in front.",
        ENGINES,
        metavar="DIR",
    )
    router_max_restarts: int = option(
        5,
        "Most restarts of a replica within --router-restart-window-secs; then it is left down.",
        SUPERVISION,
        check=at_least(0),
    )
    router_restart_window_secs: float = option(
        600, "The window in which restarts are counted.", SUPERVISION, unit="s", check=above(0)
    )
    router_restart_initial_backoff_secs: float = option(
        1, "Pause before the first restart; it doubles with each further one.", SUPERVISION, unit="s", check=at_least(0)
    )
    router_restart_max_backoff_secs: float = option(60, "Longest such pause.", SUPERVISION, unit="s", check=at_least(0))
    router_hang_timeout_secs: float = option(
        60,
        "A replica that fails its health checks for so long, and serves nothing meanwhile, is killed and restarted.",
        SUPERVISION,
        unit="s",
        check=above(0),
    )
    router_drain_timeout_secs: float = option(
        180,
        "How long a replica may take to finish its requests before it is restarted or scaled down.",
        SUPERVISION,
        unit="s",
        check=at_least(0),
    )
    router_stop_grace_secs: float = option(
        10, "How long an engine may take to end after SIGTERM; then SIGKILL.", SUPERVISION, unit="s", check=at_least(0)
    )

    # other names, those of the engines
    dp: int | None = alias("dp_size")
    data_parallel_size: int | None = alias("dp_size")
    model: str | None = alias("model_path")

    @property
    def size(self) -> int:
        """How many replicas are asked for."""
        return self.dp_size or (2 if self.backend in _MANY else 1)


LAUNCH = Table(LaunchOptions, given="launch_flags_given")


class CommandLine(NamedTuple):
    """One command line, sorted by whom it speaks to. `engine` is as it came."""

    options: LaunchOptions
    router: RouterArgs
    engine: tuple[str, ...]


def parse(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = "sglang-router serve"
) -> CommandLine:
    """Sorts a command line (without the program's name); the environment and a file speak to the router only.

    Raises: ConfigError; SystemExit(0) after --help.
    """
    own, engines = _cut(list(argv))
    parser = _parser(prog)
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
    """What stands before the first `--` and what behind it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_SPELLINGS.get(word, word) for word in argv[:end]], argv[end + 1 :]


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--backend NAME] --model-path MODEL [--dp-size N] [--host HOST] [--port PORT]\n"
        "       [--router-... options of the router] [options of the engine]",
        description="Starts replicas of an engine and the router in front of them, as one OpenAI server.\n"
        "Every flag that is not listed here goes to each engine as it is, and so does all that follows `--`.",
        epilog="The router's options, those in the groups from Workers on, are also variables SGLANG_ROUTER_<NAME>\n"
        "and keys of the file given with --router-config.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", action="help", help="show this text (also -h)")
    add_table(parser, LAUNCH)
    RouterArgs.add_cli_args(parser, use_router_prefix=True)
    return parser


def markdown() -> str:
    """The tables of the launcher's own options, a section for each group."""
    return "".join(sections(LAUNCH, LAUNCH.options.values())).replace("\n## ", "\n### ").lstrip("\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.launch.options --markdown")
    sys.stdout.write(markdown())
