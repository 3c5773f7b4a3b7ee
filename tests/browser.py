"""Headless Chromium for tests, driven through chromedriver's WebDriver protocol over plain HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver writes a reference to an element
_STARTED = re.compile(r"started successfully on port (\d+)")

#: The keys that have no character, as WebDriver spells them.
TAB, ENTER, ESCAPE = "\ue004", "\ue007", "\ue00c"
LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"


def missing() -> str | None:
    """What has to be installed before a browser can be driven, or None."""
    found = next((path for path in map(shutil.which, CHROMIUM) if path), None)
    lacking = [name for name, path in (("chromium", found), ("chromedriver", shutil.which("chromedriver"))) if not path]
    return f"no {' and no '.join(lacking)} on the PATH; apt-get install chromium chromium-driver" if lacking else None


class Browser:
    """One window. Elements are named by CSS selectors."""

    def __init__(self, port: int, profile: Path, size: tuple[int, int]) -> None:
        self._port = port
        self._session = ""
        arguments = ["--headless=new", "--disable-gpu", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
        arguments += [f"--user-data-dir={profile}", "--window-size={},{}".format(*size), "--no-first-run"]
        options = {"args": arguments, "binary": next(path for path in map(shutil.which, CHROMIUM) if path)}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file anew, also when only the fragment differs."""
        self._ask("POST", "url", {"url": "about:blank"})
        self._ask("POST", "url", {"url": path.as_uri() + fragment})

    def run(self, script: str, *arguments: object) -> Any:
        """The value that the body of a JavaScript function returns."""
        return self._ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return [str(text) for text in self.run(script, selector)]

    def text(self, selector: str) -> str:
        return "\n".join(self.texts(selector))

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0])?.scrollIntoView({block: 'center'})", selector)
        self._ask("POST", f"element/{self._find(selector)}/click", {})

    def hover(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0])?.scrollIntoView({block: 'center'})", selector)
        origin = {_ELEMENT: self._find(selector)}
        move = {"type": "pointerMove", "origin": origin, "x": 0, "y": 0}
        self._ask("POST", "actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def press(self, keys: str) -> None:
        """Type into whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def wait(self, condition: str, *arguments: object, seconds: float = 5.0) -> None:
        """Until the JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})", *arguments):
            assert time.monotonic() < deadline, f"still not true after {seconds} s: {condition} {arguments}"
            time.sleep(0.03)

    def prefer(self, scheme: str) -> None:
        """As a system set to "light" or "dark" would."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("POST", "goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def resize(self, width: int, height: int) -> None:
        self._ask("POST", "window/rect", {"width": width, "height": height})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "screenshot")))

    def complaints(self) -> list[str]:
        """What the console has got since this was last asked."""
        return [str(entry["message"]) for entry in self._ask("POST", "se/log", {"type": "browser"})]

    def close(self) -> None:
        self._send("DELETE", f"/session/{self._session}")

    def _find(self, selector: str) -> str:
        return str(self._ask("POST", "element", {"using": "css selector", "value": selector})[_ELEMENT])

    def _ask(self, method: str, what: str, body: object = None) -> Any:
        return self._send(method, f"/session/{self._session}/{what}", body)

    def _send(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{path}: {answer['error']}: {answer.get('message', '')}")
        return answer


@contextmanager
def browser(profile: Path, size: tuple[int, int] = (1440, 1000)) -> Iterator[Browser]:
    """Chromedriver and a window, both gone afterwards."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        started = next((found for line in driver.stdout if (found := _STARTED.search(line))), None)
        assert started is not None, "chromedriver did not start"
        window = Browser(int(started[1]), profile, size)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(timeout=10)
