"""Look at the documentation's site in Chromium, as its readers do (`sh scripts/test-docs --site`).

every page     on a phone and on a screen, light and dark: nothing is wider than the window, every picture is there,
               no Markdown is shown as it is written, nothing is asked of another machine, and the
               browser's console has no complaint
the search     from a folder (file://) and from a server: questions of operators lead to the page that answers them
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

SITE = Path(__file__).parents[1] / "site"
WIDTHS = {"phone": (390, 844), "screen": (1440, 900)}
QUESTIONS = {
    "drain a worker": "Quick start",
    "how do I add an API key": "Security: keys, TLS, browsers",
    "why is my hit rate low": "Troubleshooting",
    "kubernetes rolling update": "Deploy on Kubernetes",
    "how do I tune the threshold": "Choose a policy and tune it",
    "write a policy": "Write a policy",
    "queue_timeout": "Overload",
    "replace the Rust router": "From the Rust router 0.3.2",
}
"""What is asked, and a page that must be among the first `SEEN` answers."""
SEEN = 3
WITHIN = 30.0
ANSWERS = "return [...document.querySelectorAll('.md-search-result__item h1')].map((each) => each.textContent.trim());"
STATE = """
const MARKDOWN = /^\\||---|\\*\\*|```|\\]\\(|^#+ |^- \\w/m;
const over = document.documentElement.scrollWidth - innerWidth;
const missing = [...document.images].filter((each) => !each.complete || !each.naturalWidth).map((each) => each.src);
const asked = performance.getEntriesByType("resource").map((each) => each.name);
const walker = document.createTreeWalker(document.querySelector("article") ?? document.body, NodeFilter.SHOW_TEXT);
const raw = [];
while (walker.nextNode())
  if (!walker.currentNode.parentElement.closest("pre, code, script, style") && MARKDOWN.test(walker.currentNode.data))
    raw.push(walker.currentNode.data.trim().slice(0, 80));
const foreign = asked.filter((each) => !each.startsWith(arguments[0]) && !each.startsWith("data:"));
return {missing, raw, foreign, wide: over > 0 ? [`by ${over} px`] : []};
"""


@contextlib.contextmanager
def browser(size: str, scheme: str = "light") -> Iterator[webdriver.Chrome]:
    """Yield Chromium with a window of a size in `WIDTHS`, for a reader who prefers light or dark."""
    width, height = WIDTHS[size]
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    metrics = {"width": width, "height": height, "pixelRatio": 1.0, "mobile": size == "phone"}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Yield the address of a server of the site on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wrong_pages(base: str) -> Iterator[str]:
    """Open every page; yield what is wrong with one."""
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    for size, scheme in (("phone", "light"), ("screen", "dark")):
        with browser(size, scheme) as driver:
            for page in pages:
                driver.get(f"{base}/{page}")
                wrong = driver.execute_script(STATE, base)
                wrong["said"] = [each["message"] for each in driver.get_log("browser")]  # type: ignore[no-untyped-call]
                yield from (f"{page} on a {size}: {what}: {each}" for what, found in wrong.items() for each in found)
        print(f"{len(pages)} pages on a {size}, {scheme}", flush=True)


def wrong_answers(base: str) -> Iterator[str]:
    """Ask the search; yield the questions that it does not answer."""
    with browser("screen") as driver:
        for question, wanted in QUESTIONS.items():
            driver.get(f"{base}/index.html")
            box = driver.find_element(By.CSS_SELECTOR, "input.md-search__input")
            driver.execute_script("arguments[0].focus()", box)
            box.send_keys(question)
            try:
                WebDriverWait(driver, WITHIN).until(functools.partial(_is_seen, wanted))
            except TimeoutException:
                yield f"{base.partition(':')[0]}: `{question}` leads to {_seen(driver)} and not to {wanted}"
    print(f"{len(QUESTIONS)} questions, {base.partition(':')[0]}", flush=True)


def _seen(driver: webdriver.Chrome) -> list[str]:
    """Return the titles of the first answers of the search."""
    found = driver.execute_script(ANSWERS)
    return [str(each) for each in found[:SEEN]]


def _is_seen(wanted: str, driver: webdriver.Chrome) -> bool:
    return wanted in _seen(driver)


def main() -> int:
    """Check the built site; return the exit status."""
    with served() as address:
        wrong = [*wrong_pages(address), *wrong_answers(address), *wrong_answers(SITE.as_uri())]
    print("\n".join(wrong) or "ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
