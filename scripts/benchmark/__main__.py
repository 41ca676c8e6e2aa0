"""The command: measures, or reads the results of a former run, and shows them. `scripts/bench` runs it."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmark import chart, documents, memory
from scripts.benchmark.loads import LOADS
from scripts.benchmark.measuring import measure
from scripts.benchmark.options import Options, parse
from scripts.benchmark.processes import BenchError, Processes, say
from scripts.benchmark.results import Results, read
from scripts.benchmark.tables import all_tables
from scripts.benchmark.targets import BEFORE, OURS, TARGETS, find
from scripts.benchmark.verdicts import OWN
from scripts.reporting import machine, table

FILES = 65_536
"""Open files that the processes may need: 10,000 idle connections, and two for each stream."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def raise_file_limit() -> None:
    """Allow many open files: as many as the system lets this user have, up to FILES."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # only root may raise the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def show(results: Results, options: Options) -> None:
    """Print the tables, and write what the options ask for. Raises: BenchError, OSError."""
    print(f"{documents.about(results)}\n\n{all_tables(results, options.markdown)}")
    if losses := documents.losses_text(results, options.markdown):
        print(f"\nWhere rivals are better (our figure by theirs):\n\n{losses}")
    if options.goals:
        print(f"\nGoals (our figure by the peer's):\n\n{documents.goals_text(results, options.markdown)}")
    sys.stdout.flush()
    if options.chart:
        options.chart.write_text(chart.draw(results))
    if options.docs:
        documents.CHART.write_text(chart.draw(results))
        documents.write(documents.PAGE, results)


def show_memory(options: Options, processes: Processes) -> bool:
    """Print the table of --memory; return whether memory stayed below the limit and no request failed."""
    ours = find(next(target for target in TARGETS if target.name == OURS), options, processes.folder)
    if isinstance(ours, str):
        raise BenchError(ours)
    print(machine(options.flags), flush=True)
    readings = memory.measure(ours, options, processes)
    print(f"\n{table(memory.HEAD, [each.row for each in readings], options.markdown)}")
    return all(each.good for each in readings)


def show_list() -> None:
    """Print the names of all targets and loads."""
    print("\n".join(f"{target.name:14}{target.title} {target.package or target.program}" for target in TARGETS))
    print("direct        no router\n")
    print("\n".join(f"{load.name:14}{load.group:10}{load.label}" for load in LOADS))
    print(f"{'tree':24}the prefix tree by itself")


def run(options: Options, processes: Processes) -> bool:
    """Do what the options ask for; return whether all requests to this router succeeded. Raises: BenchError."""
    if options.memory:
        return show_memory(options, processes)
    results = read(options.source) if options.source else measure(options, processes)
    show(results, options)
    return not results.errors([*OWN, BEFORE])


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if options.listing:
        show_list()
        return 0
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # also if the parent process ignored SIGINT
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="sglang-router-bench-") as folder:
        processes = Processes(Path(folder))
        try:
            return 0 if run(options, processes) else 1
        except (BenchError, OSError, ValueError, subprocess.SubprocessError) as error:
            say(str(error))
            return 2
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the clean-up
            processes.stack.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
