"""The commands in README.md, CONTRIBUTING.md and docs/: find them, check their words, run them as they stand.

Every block of commands says how it is proved:

    ```sh run="always"              run by tests/blackbox/test_documentation.py, and so by `sh scripts/test`
    ```sh run="by-hand"             run by `sh scripts/test-docs` only: it takes long
    ```sh no-test="needs a GPU"     not run, for this reason; its flags are still checked (tests/test_docs_commands.py)

A page's blocks are run in their order, as one reader would do it, in one folder: see `Walk`. A block with a title, such
as ```yaml title="router.yaml", is a file that the reader makes there. What a `console` block shows below a command must
be what the command writes, but for numbers and spaces; a line of `...` stands for any lines. With output="exact" it
must be the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from routers import environment, free_port

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("sh", "bash", "console")
ALWAYS, BY_HAND = "always", "by-hand"
WITHIN = 120.0
"""Seconds after which a server that does not answer, or a command that does not end, is a failure; `by-hand` ones may
take ten times as long."""
_FENCE = re.compile(r"^( *)(`{3,})(.*)$")
_MARK = re.compile(r'([a-z-]+)="([^"]*)"')
_SERVERS = re.compile(
    r"^(?:sglang-router (?:launch|serve|engine)|python -m sglang_router\.(?:launch_router|launch_server|engine))\b"
    r"(?!.*(?:--help|--check-config|--version))"
)
_ENGINE = re.compile(r"sglang-router engine|python -m sglang_router\.engine")
_LOOKS = ("sglang-router status", "sglang-router workers")
"""What a reader may have to enter again, until what was begun has happened."""
_ASSIGNMENT = re.compile(r"^[A-Z_]+=\S+$")
_REDIRECTION = re.compile(r"\d?[<>]")
_PORT = re.compile(r"(?<=127\.0\.0\.1:)\d{4,5}\b|(?<=localhost:)\d{4,5}\b|(?<=--port )\d{4,5}\b")


class Block(NamedTuple):
    """A fenced block. line: of its fence; language: "" for none; marks: of its fence, by name."""

    document: Path
    line: int
    language: str
    marks: dict[str, str]
    text: str

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def run(self) -> str:
        return self.marks.get("run", "")


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    begun, body = 0, list[str]()
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence is not None:
            opened, begun, body = fence, number, []
        elif opened is not None and fence is not None and fence[2] == opened[2] and not fence[3]:
            language, _, marks = opened[3].strip().partition(" ")
            text = "\n".join(row.removeprefix(opened[1]) for row in body)
            found.append(Block(document, begun, language, dict(_MARK.findall(marks)), text))
            opened = None
        elif opened is not None:
            body.append(line)
    return found


def unfenced(document: Path) -> list[int]:
    """Return the lines at which code begins that is only indented: nobody could say what it is."""
    found, fenced, listed, before = list[int](), False, False, ""
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and line.strip():
            if re.match(r" *(?:[-*]|\d+\.) ", line):
                listed = True
            elif not line.startswith(" "):
                listed = False
            elif line.startswith("    ") and not before.strip() and not listed:
                found.append(number)
        before = line
    return found


def entered(block: Block) -> list[tuple[str, list[str]]]:
    """Return what is typed, a logical line each, with what is shown below it (only in a console)."""
    found: list[tuple[str, list[str]]] = []
    going_on = False
    for line in block.text.splitlines():
        if going_on:
            found[-1] = (f"{found[-1][0]}\n{line.removeprefix('> ')}", found[-1][1])
        elif block.language == "console" and not line.startswith("$ "):
            if found:
                found[-1][1].append(line)
            continue
        elif line.strip():
            found.append((line.removeprefix("$ "), []))
        going_on = line.endswith("\\")
    return [(line, shown) for line, shown in found if not line.lstrip().startswith("#")]


def commands(block: Block) -> Iterator[list[str]]:
    """Return the words of each command, without variables before it and redirections behind it."""
    for line, _ in entered(block):
        lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&|;"):
                words = command[: next((n for n, each in enumerate(command) if _REDIRECTION.match(each)), len(command))]
                while words and _ASSIGNMENT.match(words[0]):
                    words = words[1:]
                if words:
                    yield words
                command = []
            else:
                command.append(word)


class Walk:
    """A reader who follows a page: makes its files, enters its commands, leaves its servers running until the end.

    Servers (router, engines) start in the background, and the next command waits until they answer. Every port that
    the page names is another one, free here; a router without one gets its ports by variables, and so do the commands
    that ask it.
    """

    def __init__(self, folder: Path, patience: float = WITHIN) -> None:
        self._folder = folder
        self._patience = patience
        self._ports: dict[str, str] = {}
        self._servers: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._assigned: list[str] = []
        router = self._port("30000")
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n", "utf-8")  # an error status is a failure
        self._environment = environment() | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "SGLANG_ROUTER_PORT": router,
            "SGLANG_ROUTER_PROMETHEUS_PORT": self._port("29000"),
            "SGLANG_ROUTER_METRICS_INTERVAL_SECS": "0",
            "SGLANG_ROUTER_URL": f"http://127.0.0.1:{router}",
            "CURL_HOME": str(folder),
            "COLUMNS": "160",
        }

    def follow(self, block: Block) -> None:
        """Make the file of a block, or enter its commands. Raises: AssertionError."""
        if "title" in block.marks:
            (self._folder / block.marks["title"]).write_text(self._here(block.text) + "\n", "utf-8")
            return
        for line, shown in entered(block):
            command = self._here(line)
            if _SERVERS.match(command):
                self._start(block.where, command.rstrip().removesuffix("&"))
            elif _ASSIGNMENT.match(command):
                self._assigned.append(command)
            else:
                self._enter(block.where, command, shown, block.marks.get("output") == "exact")

    def end(self) -> None:
        """End the servers, the last one first."""
        for _, process, _ in reversed(self._servers):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self._servers.clear()

    def _port(self, documented: str) -> str:
        if documented not in self._ports:
            self._ports[documented] = str(free_port())
        return self._ports[documented]

    def _here(self, text: str) -> str:
        return _PORT.sub(lambda port: self._port(port[0]), text)

    def _start(self, where: str, command: str) -> None:
        log = self._folder / f"server-{len(self._servers)}.out"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self._servers.append((command, process, log))
        port = re.search(r"--port (\d+)", command)
        path = "health" if _ENGINE.match(command) else "readiness"
        url = f"http://127.0.0.1:{port[1] if port else self._port('30000')}/{path}"
        deadline = time.monotonic() + self._patience
        while not _answers(url):
            said = log.read_text("utf-8", "replace")[-2000:]
            assert process.poll() is None, f"{where}: `{command}` ended with {process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"{where}: `{command}` was not ready within {self._patience} s:\n{said}"
            time.sleep(0.05)

    def _enter(self, where: str, command: str, shown: list[str], exact: bool) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            said = self._say(where, command)
            same = said.splitlines() == shown if exact else alike(shown, said.splitlines())
            if same or not any(line.strip() for line in shown):
                return
            again = command.startswith(_LOOKS) and time.monotonic() < deadline
            assert again, f"{where}: `{command}` does not write what is shown, but\n{said}"

    def _say(self, where: str, command: str) -> str:
        """Run a command, and return what it has written. Raises: AssertionError, if it fails."""
        try:
            done = subprocess.run(
                ["sh", "-ec", "\n".join([*self._assigned, command])],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._patience,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{where}: `{command}` did not end within {self._patience} s") from None
        said, complained = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        assert done.returncode == 0, f"{where}: `{command}` ended with {done.returncode}:\n{said[-2000:]}{complained}"
        return said


def alike(shown: list[str], said: list[str]) -> bool:
    """Return whether a text is what is shown, but for numbers, spaces and empty lines; `...` is any number of lines."""
    pattern = "".join("(?:.*\n)*" if line == "..." else re.escape(line) + "\n" for line in map(_plain, shown) if line)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in map(_plain, said) if line)) is not None


def _plain(line: str) -> str:
    """Return a line in which every number is 0, every gap one space, and a compiled router like any other."""
    return " ".join(re.sub(r"\d[\d.,]*", "0", line).replace("(compiled)", "(interpreted)").split())


def _answers(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@contextlib.contextmanager
def walk(folder: Path, patience: float = WITHIN) -> Iterator[Walk]:
    """Yield a reader; end the servers that he started."""
    reader = Walk(folder, patience)
    try:
        yield reader
    finally:
        reader.end()
