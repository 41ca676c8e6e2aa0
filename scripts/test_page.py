"""Test the page for operators as they use it: Chromium, a router that runs its engines, and clicks.

    course_of_keys      without a key, with a wrong one, with one that may read, with one that may change
    course_of_actions   drain, resume, restart, remove, add, restart all: each confirmed, and seen in the router itself
    course_of_looking   filter, sort, a worker, a decision, the keyboard, light, dark, a phone
    course_of_trouble   a router that hangs, one that is started anew, a key that is taken away
    course_of_names     names that would change the page, and a foreign name that was made to point to the router
    course_of_many      1,000 workers: what a second of the page costs the browser, and a frame the router

Each ends with the browser's console: an error there, or a breach of the Content-Security-Policy, is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from engines import engine_processes
from routers import COMMAND, RouterProcess, ask, environment, free_port, router_process
from sglang_router.routing.rules import HealthRules
from stack import Stack, stack

WITHIN = 90.0
"""Seconds after which a step fails: a restart of an engine takes some on a busy machine."""
ADMIN, USER = "an-admin-key-0123456789", "a-user-key-0123456789"
ENGINES = 3
MANY = 1000
POINTS = 9
"""Of a curve, before a picture is made of it: one each 10 s."""
SLOWEST_SECOND = 0.5
"""Seconds of script and layout that the page may take of a second with many workers."""


class Browser:
    """One window of Chromium at the page of a router.

    pictures  where to leave them; None: nowhere
    foreign   a name that leads to this machine; "": there is none
    """

    def __init__(self, url: str, pictures: Path | None, size: str = "1440,1000", foreign: str = "") -> None:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        if foreign:
            options.add_argument(f"--host-resolver-rules=MAP {foreign} 127.0.0.1")
        options.add_argument(f"--window-size={size}")
        options.binary_location = "/usr/bin/chromium"
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self._pictures = pictures
        self._said: list[str] = []
        self.driver.get(url)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """Return the text of an element as people see it; "" if there is none."""
        with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
            return self.find(css).text
        return ""

    def until(self, what: str, holds: Callable[[], object]) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + WITHIN
        while True:
            with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
                if holds():
                    return
            if time.monotonic() > deadline:
                self.picture("failed")
                raise AssertionError(f"not seen within {WITHIN:g} s: {what}; it says {self.text('#said')!r}")
            time.sleep(0.1)

    def click(self, css: str) -> None:
        self.find(css).click()

    def use_key(self, key: str) -> None:
        """Type a key into the dialog that asks for it."""
        self.until("the dialog that asks for a key", lambda: self.find("#asks-key").is_displayed())
        self.find("#key-value").send_keys(key)
        self.click("#asks-key button[type=submit]")

    def live(self) -> None:
        self.until("a stream of frames", lambda: self.text("#link") == "live")

    def row(self, url: str) -> str:
        """Return the selector of a worker's row."""
        found = self.driver.execute_script(
            "const all = [...document.querySelectorAll('#workers tbody tr')];"
            "return all.find(tr => tr.querySelector('th').textContent === arguments[0])?.dataset.id ?? '';",
            url,
        )
        return f'#workers tr[data-id="{found}"]'

    def state(self, url: str) -> str:
        return self.text(f"{self.row(url)} .state")

    def act(self, url: str, action: str, yes: bool = True) -> None:
        """Click an action of a worker, and answer the question."""
        self.until(
            f"{action} can be clicked", lambda: self.find(f"{self.row(url)} [data-action={action}]").is_displayed()
        )
        self.click(f"{self.row(url)} [data-action={action}]")
        self.answer(yes)

    def answer(self, yes: bool = True) -> None:
        """Answer the question whether a change is meant."""
        self.until("a question", lambda: self.find("#confirm").is_displayed())
        self.click("#confirm-yes" if yes else "#confirm [data-close]")

    def light(self, scheme: str) -> None:
        """Let the system be "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, name: str) -> None:
        if self._pictures is not None:
            self.driver.save_screenshot(str(self._pictures / f"{name}.png"))

    def spent(self) -> float:
        """Return the seconds that the page has taken of the browser: script, style and layout."""
        self.driver.execute_cdp_cmd("Performance.enable", {})
        told = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        wanted = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
        return float(sum(each["value"] for each in told if each["name"] in wanted))

    def close(self, *expected: str) -> None:
        """End it. Raises: AssertionError, for an error in its console that has none of the expected texts."""
        lines = [line["message"] for line in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        self.driver.quit()
        bad = [line for line in lines if not any(text in line for text in expected)]
        assert not bad, bad


@contextlib.contextmanager
def browser(
    url: str, pictures: Path | None, *expected: str, size: str = "1440,1000", foreign: str = ""
) -> Iterator[Browser]:
    """Yield a window; expected: texts of lines in its console that are no failure."""
    opened = Browser(url, pictures, size, foreign)
    try:
        yield opened
    except BaseException:
        opened.driver.quit()
        raise
    opened.close(*expected)


# -- the router --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched() -> Iterator[RouterProcess]:
    """Yield a router that runs its engines, and wants keys for its control plane."""
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name) / "keys"
        keys.write_text(f"ops:On Call:admin:{ADMIN}\ndesk:The Desk:user:{USER}\n")
        keys.chmod(0o600)
        port = free_port()
        command = [sys.executable, "-m", "sglang_router.launch_server", "--backend", "builtin"]
        command += ["--dp-size", str(ENGINES), "--port", str(port), "--router-prometheus-port", "0"]
        command += ["--router-dp-worker-base-port", str(free_port())]
        command += ["--router-control-plane-api-keys-file", str(keys)]
        log = Path(name) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        url = f"http://127.0.0.1:{port}"
        router = RouterProcess(process, url, f"{url}/metrics", log, key=ADMIN)
        try:
            router.until(lambda: _is_up(router), WITHIN)
            yield router
            router.end()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _is_up(router: RouterProcess) -> bool:
    with contextlib.suppress(OSError):
        workers = router.get("/workers").json()["workers"]
        return len(workers) == ENGINES and all(worker["is_healthy"] for worker in workers)
    return False


@contextlib.contextmanager
def alone() -> Iterator[RouterProcess]:
    """Yield a router without keys, whose engines run elsewhere, which explains all that it does."""
    flags = ("--shadow-policy", "round_robin", "--autoscale", "1:4", "--decision-table-every", "1")
    engines = ("--speed", "4", "--model", "tiny")
    with engine_processes(ENGINES, *engines) as urls, router_process(urls, "--relay-processes", "2", *flags) as router:
        yield router


@contextlib.contextmanager
def load(router: RouterProcess) -> Iterator[None]:
    """Send requests of four conversations, some a second, until the block ends."""
    over = threading.Event()

    def run() -> None:
        for number in itertools.count():
            text = f"Conversation {number % 4}: " + 60 * "all the world's a stage, " + f"turn {number}"
            with contextlib.suppress(OSError):
                router.post("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 16})
            if over.wait(0.1):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(WITHIN)


# -- the courses -------------------------------------------------------------------------------------------------------

_REFUSED = ("401 (Unauthorized)", "403 (Forbidden)")
"""What the console says of a key that is refused."""
_INSECURE = "Cross-Origin-Opener-Policy header has been ignored"
"""And of any page over plain HTTP that is not from this machine."""
_TWICE = "409 (Conflict)"
"""And of a worker that is there already."""


def course_of_keys(router: RouterProcess, pictures: Path | None) -> None:
    with browser(router.url, pictures, *_REFUSED) as page:
        page.use_key("no-key-of-this-router")
        page.until("why the key is refused", lambda: "key" in page.text("#key-why").lower())
        page.use_key(USER)
        page.live()
        page.until("all workers", lambda: page.text("#count") == str(ENGINES))
        assert "role admin" in page.text("#limits"), page.text("#limits")
        assert not page.find("#add").is_enabled()
        assert not any(button.is_enabled() for button in page.driver.find_elements(By.CSS_SELECTOR, "td.act button"))
        page.click("#key")
        page.use_key(ADMIN)
        page.until("that changes are allowed", lambda: page.find("#add").is_enabled())
        assert page.driver.get_cookies() == []
        assert page.driver.current_url == f"{router.url}/"
        stored = page.driver.execute_script("return [localStorage.length, Object.values(sessionStorage)];")
        assert stored == [0, [ADMIN]], stored
        page.click("#key")
        page.until("the dialog", lambda: page.find("#key-forget").is_displayed())
        page.click("#key-forget")
        page.until("that it is forgotten", lambda: page.find("#asks-key").is_displayed())


def course_of_actions(router: RouterProcess, pictures: Path | None) -> None:
    first, second = sorted(router.workers())[:2]
    with engine_processes(1, "--speed", "0") as (another,), browser(router.url, pictures, *_REFUSED, _TWICE) as page:
        page.use_key(ADMIN)
        page.live()
        page.until("a healthy worker", lambda: page.state(first) == "healthy")
        page.act(first, "drain", yes=False)
        assert not router.worker(first)["draining"]
        page.act(first, "drain")
        page.until("that it drains", lambda: page.state(first) == "draining")
        assert router.worker(first)["draining"]
        page.picture("draining")
        page.act(first, "resume")
        page.until("that it is back", lambda: page.state(first) == "healthy")
        assert not router.worker(first)["draining"]
        page.act(second, "restart")
        router.until(lambda: router.worker(second)["replica"]["restarts"] == 1, WITHIN)
        page.until("the restarted worker", lambda: page.state(second) == "healthy")
        page.click("#add")
        page.find("#add-url").send_keys(another)
        page.find("#add-model").send_keys("another-model")
        page.click("#adds button[type=submit]")
        page.answer()
        page.until("the new worker", lambda: page.state(another) == "healthy")
        assert router.worker(another)["model_id"] == "another-model"
        page.click("#add")
        page.find("#add-url").clear()
        page.find("#add-url").send_keys(another)
        page.click("#adds button[type=submit]")
        page.answer()
        page.until("why it is not added twice", lambda: "already exists" in page.text("#add-why"))
        page.click("#adds [data-close]")
        page.act(another, "remove")
        page.until("that it is gone", lambda: page.text("#count") == str(ENGINES))
        assert another not in router.workers()
        page.click("#roll")
        page.answer()
        page.until("that it has begun", lambda: page.text("#said") == "Restart all: begun")
        page.until("the progress", lambda: "Rolling restart running" in page.text("#rolling-text"))
        page.picture("rolling")
        page.until("the end", lambda: f"Rolling restart done: {ENGINES} of {ENGINES}" in page.text("#rolling-text"))
        page.until("all workers", lambda: all(page.state(url) == "healthy" for url in router.workers()))
        events = page.text("#events tbody")
        for what in ("draining", "health: healthy", "removed", "added"):
            assert what in events, (what, events)


def course_of_looking(router: RouterProcess, pictures: Path | None) -> None:
    with load(router), browser(router.url, pictures) as page:
        page.live()
        page.until("requests", lambda: page.text("#decisions tbody") and "%" in page.text("#figures"))
        page.until("a curve", lambda: page.driver.execute_script(_CURVES) >= POINTS)
        for scheme in ("light", "dark"):
            page.light(scheme)
            page.picture(scheme)
        page.light("light")
        page.click("#pause")
        _explanation(page)
        _filter_and_sort(page, router)
        _keyboard(page, router)
        _without_keys(page, router)
        page.until("the scaling", lambda: f"{ENGINES} workers, " in page.text("#scale"))
        assert "round_robin would have chosen" in page.text("#shadow"), page.text("#shadow")
        unnamed = page.driver.execute_script(_UNNAMED)
        assert unnamed == [], unnamed
    with load(router), browser(router.url, pictures, size="500,900") as page:
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _PHONE)
        page.live()
        page.until("the workers", lambda: page.text("#count") == str(ENGINES))
        page.until("figures", lambda: "%" in page.text("#figures"))
        wider = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth;")
        assert wider <= 0, f"the page is {wider} px wider than the phone"
        page.picture("phone")
        page.click("#workers tbody button.link")
        page.until("the worker's actions", lambda: page.find("#worker [data-action=drain]").is_displayed())
        page.picture("phone-worker")


_PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
_CURVES = "return document.querySelector('polyline').getAttribute('points')?.split(' ').length ?? 0;"
_UNNAMED = """
return [...document.querySelectorAll('button, input, select, table, dialog, svg')]
  .filter(e => !(e.textContent.trim() || e.ariaLabel || e.getAttribute('aria-labelledby') || e.closest('label')))
  .map(e => e.outerHTML)
  .concat([...document.querySelectorAll('thead th')].filter(e => e.scope !== 'col').map(e => e.outerHTML));
"""


def _explanation(page: Browser) -> None:
    page.click("#decisions tbody tr button")
    page.until("the explanation", lambda: "(chosen)" in page.text("#decision-body"))
    assert "bytes of text believed to be cached" in page.text("#decision-body")
    page.picture("decision")
    page.click("#decision [data-close]")


def _filter_and_sort(page: Browser, router: RouterProcess) -> None:
    urls = sorted(router.workers())
    page.find("#filter").send_keys(urls[1].rpartition(":")[2])
    page.until("only that worker", lambda: page.text("#count") == f"1 of {ENGINES}")
    page.find("#filter").send_keys(Keys.CONTROL, "a", Keys.DELETE)
    page.until("all of them", lambda: page.text("#count") == str(ENGINES))
    shown = [each.text for each in page.driver.find_elements(By.CSS_SELECTOR, "#workers tbody th")]
    assert shown == urls
    page.click("#workers th[data-by=url] button")
    page.until("the other order", lambda: page.find("th[data-by=url]").get_attribute("aria-sort") == "descending")
    shown = [each.text for each in page.driver.find_elements(By.CSS_SELECTOR, "#workers tbody th")]
    assert shown == urls[::-1]


def _keyboard(page: Browser, router: RouterProcess) -> None:
    """Drain a worker with the keyboard alone, and leave the question with Escape."""
    url = sorted(router.workers())[0]
    button = page.find(f"{page.row(url)} [data-action=drain]")
    button.send_keys(Keys.ENTER)
    page.until("a question", lambda: page.find("#confirm").is_displayed())
    assert page.find("#confirm").get_attribute("aria-labelledby") == "confirm-title"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until("that it is gone", lambda: not page.find("#confirm").is_displayed())
    back = page.driver.execute_script("return document.activeElement.dataset.action;")
    assert back == "drain", f"the focus is at {back}"
    assert not router.worker(url)["draining"]


def _without_keys(page: Browser, router: RouterProcess) -> None:
    """Change a worker where no key is configured: the router's own page may, from this machine."""
    url = sorted(router.workers())[0]
    for action, state in (("drain", "draining"), ("resume", "healthy")):
        page.act(url, action)
        page.until(f"that it is {state}", lambda state=state: page.state(url) == state)  # type: ignore[misc]


def course_of_trouble(pictures: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name, engine_processes(1, "--speed", "0") as urls:
        keys, port = Path(name) / "keys", free_port()
        keys.write_text(f"ops:On Call:admin:{ADMIN}\ndesk:The Desk:user:{USER}\n")
        keys.chmod(0o600)
        flags = ("--port", str(port), "--control-plane-api-keys-file", str(keys))
        url = f"http://127.0.0.1:{port}"
        with _on_port(urls, flags) as process, browser(url, pictures, *_REFUSED, "ERR_") as page:
            page.use_key(ADMIN)
            page.live()
            process.send_signal(signal.SIGSTOP)
            page.until("that it hangs", lambda: "silent" in page.text("#link"))
            assert "all below is of then" in page.text("#stale")
            page.picture("stale")
            process.send_signal(signal.SIGCONT)
            page.live()
            assert page.text("#stale") == ""
            keys.write_text(f"ops:On Call:user:{ADMIN}\ndesk:The Desk:user:{USER}\n")
            process.send_signal(signal.SIGHUP)
            page.until("that nothing can be changed any more", lambda: "role admin" in page.text("#limits"))
            assert not page.find("#add").is_enabled()
            keys.write_text(f"desk:The Desk:user:{USER}\n")
            process.send_signal(signal.SIGHUP)
            page.until("why the key is refused", lambda: "key" in page.text("#key-why").lower())
            page.use_key(USER)
            page.live()
            process.terminate()
            process.wait(WITHIN)
            page.until("that it is gone", lambda: "not connected" in page.text("#link"))
            with _on_port(urls, flags):
                page.live()
                page.until("its worker", lambda: page.state(urls[0]) == "healthy")


@contextlib.contextmanager
def _on_port(urls: list[str], flags: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a router on a port that the flags name, for one that is started again."""
    command = [*COMMAND, *flags, "--prometheus-port", "0", "--worker-urls", *urls]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WITHIN
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if ask(f"http://127.0.0.1:{flags[1]}", "GET", "/liveness").status == 200:
                    break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def course_of_names(pictures: Path | None) -> None:
    with stack(health=HealthRules(enabled=False)) as router:
        for number, model in enumerate(("<img src=x onerror=alert(1)>", "abc\u202egnp.exe", "m" * 256)):
            router.add(f"http://10.0.0.{number + 1}:8000/{'path' * 30}", model_id=model)
        with browser(f"http://127.0.0.1:{router.port}/", pictures) as page:
            page.live()
            page.until("the names as they are", lambda: "<img src=x onerror=alert(1)>" in page.text("#workers"))
            assert "abc\\u202egnp.exe" in page.text("#workers")
            page.picture("strangers")
            page.click("#workers tbody button.link")
            wider = page.driver.execute_script(_WIDER, page.find("#worker"))
            assert wider <= 0, f"the dialog is {wider} px wider than its frame"
        url = f"http://evil.example:{router.port}/"
        with browser(url, pictures, *_REFUSED, _INSECURE, foreign="evil.example") as page:
            page.until("why it is refused", lambda: "--control-plane-allowed-hosts" in page.text("#limits"))
            assert page.driver.execute_async_script(_ASK_AS_CURL) == 403
            assert page.text("#count") == ""


_WIDER = "return arguments[0].scrollWidth - arguments[0].clientWidth;"
_ASK_AS_CURL = """
const done = arguments[0];
fetch("/workers", {headers: {"User-Agent": "curl/8", "Accept-Language": ""}, referrerPolicy: "no-referrer"})
  .then(answer => done(answer.status), done);
"""


def course_of_many(pictures: Path | None) -> str:
    """Return what it measured."""
    with stack(health=HealthRules(enabled=False)) as router:
        for number in range(MANY):
            router.add(f"http://10.0.{number // 250}.{number % 250 + 1}:8000", model_id=f"model-{number % 3}")
        with browser(f"http://127.0.0.1:{router.port}/", pictures) as page:
            page.live()
            page.until("all workers", lambda: page.text("#count") == str(MANY))
            assert page.text("#shown") == "page 1 of 10"
            stop = threading.Event()
            thread = threading.Thread(target=_vary, args=(router, stop))
            thread.start()
            spent, frame, begun = page.spent(), _frame(page), time.monotonic()
            page.until("ten frames", lambda: _frame(page) >= frame + 10)
            frames, wall = _frame(page) - frame, time.monotonic() - begun
            each = (page.spent() - spent) / frames
            page.picture("many")
            page.click("#after")
            page.until("the second page", lambda: page.text("#shown") == "page 2 of 10")
            page.find("#filter").send_keys("10.0.3.")
            page.until("the filter", lambda: page.text("#count") == f"250 of {MANY}")
            elements = page.driver.execute_script("return document.querySelectorAll('#workers tbody tr').length;")
            stop.set()
            thread.join()
        assert elements == 100, elements
        assert each < SLOWEST_SECOND, f"a second of the page takes {each:.3f} s of the browser"
    return f"{MANY} workers, all changing: {frames} frames in {wall:.1f} s, each {1000 * each:.0f} ms of the browser"


def _vary(router: Stack, stop: threading.Event) -> None:
    """Change a figure of every worker, four times a second."""

    def change() -> None:
        for worker in router.fleet:
            worker.waiting = (worker.waiting + 1) % 7

    while not stop.wait(0.25):
        router.call(change)


def _frame(page: Browser) -> int:
    return int(page.find("#link").get_attribute("data-frame") or 0)


Course = Callable[[RouterProcess, "Path | None"], None]


def main() -> None:
    """Raises: AssertionError for whatever does not work."""
    parser = argparse.ArgumentParser(prog="scripts/test-page", description="Test the page in Chromium.")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of what was seen")
    pictures: Path | None = parser.parse_args().pictures
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    courses: tuple[tuple[Callable[[], Any], tuple[Course, ...]], ...] = (
        (launched, (course_of_keys, course_of_actions)),
        (alone, (course_of_looking,)),
    )
    for start, wanted in courses:
        with start() as router:
            for course in wanted:
                course(router, pictures)
                print(f"passed: {course.__name__}", flush=True)
    course_of_trouble(pictures)
    print("passed: course_of_trouble", flush=True)
    course_of_names(pictures)
    print("passed: course_of_names", flush=True)
    print(f"passed: course_of_many: {course_of_many(pictures)}")


if __name__ == "__main__":
    main()
