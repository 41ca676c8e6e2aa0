"""Real engines behind launch_server, and prefill/decode pairs of them: install each, run all checks
(`real_engines.course`, `real_engines.pair_course`, `real_engines.traces`), write its rows in docs/engines.md.

scripts/test-engines [llamacpp|vllm|sglang|sglang-pd|vllm-pd|vllm-push-pd|sglang-traces|vllm-traces ...]

(a shell script; prepares the environment and runs this)

--quick     only the tiny model, no download, no row written: for the test suite
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from scripts.real_engines import models
from scripts.real_engines.course import Course
from scripts.real_engines.engines import CHECKOUT, ENGINES, ENVIRONMENTS, Engine, SetupError, version
from scripts.real_engines.launched import CourseError
from scripts.real_engines.pair_course import Front, Given, in_namespace
from scripts.real_engines.pair_routers import FRONTS
from scripts.real_engines.pairs import KINDS, SGLANG_PD, PairKind, install
from scripts.real_engines.results import Results

from sglang_router.errors import ConfigError

PAGE = CHECKOUT / "docs" / "engines.md"
BEGIN, PAIRS_BEGIN, TRACES_BEGIN = (f"<!-- {table}: begin -->\n" for table in ("measured", "pairs", "traces"))
END = "<!-- measured: end -->\n"
COLUMNS = (
    *("engine", "version", "both healthy", "requests", "failed", "streams cut by kill -9", "cached tokens predicted"),
    *("reported", "back after kill -9", "rolling restart", "Ctrl-C", "date"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def row(engine: Engine, python: str, results: Results) -> str:
    cells = [
        engine.name,
        f"`{engine.package}` {version(python, engine.package)}",
        f"{results.start:.1f} s",
        f"{results.requests:,}",
        str(results.failed),
        str(results.cut),
        f"{results.predicted:,}",
        f"{results.reported:,}",
        f"{results.back:.1f} s",
        f"{results.rolling:.1f} s",
        f"{results.end:.1f} s",
        _today(),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def write(begin: str, head: str, lines: list[str], order: Collection[str]) -> None:
    """Replace the rows of one name in a table of docs/engines.md.

    begin  where the table begins
    lines  its rows; the name is their first cell
    order  of the names
    """
    before, _, rest = PAGE.read_text().partition(begin)
    table, _, after = rest.partition(END)
    rows: dict[str, list[str]] = {}
    for line in table.splitlines(keepends=True)[2:]:
        rows.setdefault(_name(line), []).append(line)
    rows[_name(lines[0])] = lines
    text = "".join("".join(rows[known]) for known in order if known in rows)
    PAGE.write_text(before + begin + head + text + END + after)


def _name(line: str) -> str:
    return line.split("|")[1].strip()


# -- pairs ------------------------------------------------------------------------------------------------

PAIR_COLUMNS = (
    *(
        "pair",
        "router",
        "requests",
        "failed",
        "handed over",
        "40 at once",
        "chat, n = 2",
        "fields of the router, sent by a client",
    ),
    *("decode killed: all answered after", "lost", "prefill killed: all answered after", "lost"),
    *("left on the engines", "date"),
)
PAIR_HEAD = f"| {' | '.join(PAIR_COLUMNS)} |\n{'|---' * len(PAIR_COLUMNS)}|\n"


def pair_row(kind: PairKind, front: Front) -> str:
    cells = [
        kind.name,
        front.name,
        str(front.requests),
        str(front.failed),
        "-" if kind is SGLANG_PD else str(front.moved),
        _seconds(front.forty),
        front.samples,
        front.fields,
        _seconds(front.decode_killed),
        str(front.decode_lost),
        _seconds(front.prefill_killed),
        str(front.prefill_lost),
        f"{front.stuck:,}",
        _today(),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _seconds(value: float | None) -> str:
    return "did not get there" if value is None else f"{value:.1f} s"


def run_pair(kind: PairKind) -> list[str]:
    """Run all checks of a kind of pair behind each router; return what is wrong with ours."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.name}-"))
    print(kind.name, flush=True)
    try:
        python, imports = install(kind)
        model = models.hugging_face(models.tiny(ENVIRONMENTS / "models"), ENVIRONMENTS / "models")
        routers = {router.name: str(path) for router in FRONTS[kind.name] if (path := router.python())}
        fronts = in_namespace(Given(kind.name, python, list(map(str, imports)), str(model), str(folder), routers))
        wrong = [what for front in fronts for what in front.wrong]
        if not wrong:
            write(PAIRS_BEGIN, PAIR_HEAD, [pair_row(kind, front) for front in fronts], KINDS)
    except (CourseError, SetupError) as error:
        wrong = [str(error)]
    if wrong:
        print(f"  logs: {folder}")
    else:
        shutil.rmtree(folder)
    return wrong


# -- traces -----------------------------------------------------------------------------------------------

TRACED = {f"{engine.name}-traces": engine for engine in ENGINES.values() if engine.tracing}
TRACE_COLUMNS = (
    *("traces", "version", "requests", "recorded", "retried", "spans of the router", "spans of the engine below them"),
    "date",
)
TRACE_HEAD = f"| {' | '.join(TRACE_COLUMNS)} |\n{'|---' * len(TRACE_COLUMNS)}|\n"


def run_traces(name: str) -> list[str]:
    """Check that an engine's spans join the router's; return what is wrong."""
    engine, results = TRACED[name], Results()
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    print(name, flush=True)
    try:
        python = engine.install()
        joined = Course(engine, python, folder, results).traced(
            _in_format(engine, models.tiny(ENVIRONMENTS / "models"))
        )
        cells = [name, f"`{engine.package}` {version(python, engine.package)}", *map(str, joined), _today()]
        if not results.wrong:
            write(TRACES_BEGIN, TRACE_HEAD, [f"| {' | '.join(cells)} |\n"], TRACED)
    except (CourseError, SetupError, ConfigError) as error:
        results.expect(False, str(error))
    if results.wrong:
        print(f"  logs: {folder}")
    else:
        shutil.rmtree(folder)
    return results.wrong


# -- all ---------------------------------------------------------------------------------------------------


def run(engine: Engine, quick: bool) -> Results:
    """Run all checks of one engine; the results contain what is wrong."""
    results = Results()
    folder = Path(tempfile.mkdtemp(prefix=f"{engine.name}-"))
    print(engine.name, flush=True)
    try:
        python = engine.install()
        course = Course(engine, python, folder, results)
        tiny = models.tiny(folder if quick else ENVIRONMENTS / "models")
        course.first(_in_format(engine, tiny))
        name, model = ("tiny", tiny) if quick else ("smollm2", models.smollm2(_progress))
        course.second(name, _in_format(engine, model))
        if not quick and not results.wrong:
            write(BEGIN, HEAD, [row(engine, python, results)], ENGINES)
    except (CourseError, SetupError, ConfigError) as error:
        results.expect(False, str(error))
    if results.wrong and not quick:
        print(f"  logs: {folder}")
    else:
        shutil.rmtree(folder)
    return results


def _in_format(engine: Engine, gguf: Path) -> Path:
    return models.hugging_face(gguf, ENVIRONMENTS / "models") if engine.folder else gguf


def _progress(done: int, total: int) -> None:
    if done == total:
        print(f"  downloaded SmolLM2, {total >> 20} MiB", flush=True)


def run_named(name: str, quick: bool) -> list[str]:
    """Run the checks of this name; return what is wrong."""
    if name in KINDS:
        return run_pair(KINDS[name])
    if name in TRACED:
        return run_traces(name)
    return run(ENGINES[name], quick).wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/test-engines", description=__doc__.partition("\n")[0])
    names = f"any of {', '.join(ENGINES)} (all of these), {', '.join((*KINDS, *TRACED))}"
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=names)
    parser.add_argument("--quick", action="store_true", help="tiny model only, no row in docs/engines.md")
    options = parser.parse_args()
    if unknown := set(options.engines) - {*ENGINES, *KINDS, *TRACED}:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join((*ENGINES, *KINDS, *TRACED))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `finally` ends the launcher
    os.chdir(CHECKOUT)
    wrong = {}
    try:
        for name in options.engines or ENGINES:
            wrong[name] = run_named(name, options.quick)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    for name, what in wrong.items():
        print(f"{name}: " + ("all is well" if not what else f"{len(what)} wrong"))
        print("".join(f"  - {each}\n" for each in what), end="")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
