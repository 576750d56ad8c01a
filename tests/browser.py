"""A headless Chromium for tests: pages as readers see them. It is spoken to over pipes, by the DevTools
protocol, so nothing else has to be installed. `make chromium` installs it where it is missing.

    python -m tests.browser URL_OR_FILE IMAGE [--width 1280] [--height 0] [--dark] [--wait JAVASCRIPT]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARTEFACTS = Path(__file__).parents[1] / "test-artefacts"  # what tests leave to be looked at
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium reads commands from 3 and answers on 4
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. errors: of its console, and exceptions of its scripts, since open()."""

    def __init__(self, path: str, seconds: float = 60) -> None:
        self.seconds = seconds  # until a command must have answered
        self.errors: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        command = [path, *OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, theirs), *command],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read, write, *theirs):
            os.close(end)
        self._number, self._rest, self._session, self._loaded = 0, b"", "", False
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self(f"{part}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it may have ended
            self._session = ""
            self._send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = self._send(method, **parameters)
        end = time.monotonic() + self.seconds
        while (message := self._next(end)).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(
        self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False, media: str = "screen"
    ) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.errors.clear()
        self._loaded = False
        self("Page.navigate", url=url)
        end = time.monotonic() + self.seconds
        while not self._loaded:
            self._next(end)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, a promise's once it is there."""
        done = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The first value of the expression that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} was not true within {seconds} s")
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """Of the whole page, or of its upper `height` pixels. The format is the suffix's (png, webp)."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        kind = path.suffix.removeprefix(".")
        quality = {"quality": 80} if kind == "webp" else {}
        shot = self("Page.captureScreenshot", format=kind, captureBeyondViewport=True, clip=clip, **quality)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content) :]
        return self._number

    def _next(self, end: float) -> dict[str, Any]:
        """The next message. end: by time.monotonic."""
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            if not (content := os.read(self._read, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._rest += content
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._see(message.get("method"), message.get("params", {}))
        return message

    def _see(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(each.get("value")) for each in told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page")
    parser.add_argument("image", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=0, help="of the picture; default: the whole page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--print", action="store_true", dest="on_paper")
    parser.add_argument("--wait", default="true", help="an expression that is true once the page is drawn")
    options = parser.parse_args()
    path = find_browser()
    if path is None:
        sys.exit("no Chromium on this machine: make chromium")
    url = options.page if "://" in options.page else Path(options.page).resolve().as_uri()
    with Browser(path) as browser:
        media = "print" if options.on_paper else "screen"
        browser.open(url, options.width, options.height or 900, dark=options.dark, media=media)
        browser.wait_for(options.wait)
        browser.screenshot(options.image, options.height or None)
        for error in browser.errors:
            print(error, file=sys.stderr)
    return bool(browser.errors)


if __name__ == "__main__":
    raise SystemExit(main())
