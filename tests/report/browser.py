"""A headless Chromium, driven over the WebDriver protocol: chromedriver takes JSON over HTTP on loopback."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "NOT_RUN: no chromium and chromedriver on the path (Debian: chromium, chromium-driver)"
BOX = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
return [box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY];"""
START_S, CALL_S = 120.0, 180.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    # Nothing of its own on the network: a request that is seen is the page's.
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "ArrowRight": ("ArrowRight", 39, "")}
"""Code, number and text of a key that is pressed."""


class Browser:
    """One session."""

    def __init__(self, port: int, profile: str) -> None:
        self.base = f"http://127.0.0.1:{port}"
        args = [*FLAGS, f"--user-data-dir={profile}"]
        options = {"binary": CHROMIUM, "args": args, "perfLoggingPrefs": {"enableNetwork": True}}
        asked = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.path = ""
        self.path = (
            f"/session/{self._call('/session', {'capabilities': {'alwaysMatch': asked}})['sessionId']}"
        )

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + self.path + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=CALL_S) as reply:
            return json.load(reply)["value"]

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        return self._call("/execute/sync", {"script": script, "args": list(args)})

    def run_async(self, script: str) -> Any:
        """The script calls its last argument with the result."""
        self._call("/timeouts", {"script": int(1000 * CALL_S)})
        return self._call("/execute/async", {"script": script, "args": []})

    def devtools(self, command: str, **params: Any) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("/se/log", {"type": kind})

    def screenshot(self) -> bytes:
        """What the window shows."""
        return base64.b64decode(self._call("/screenshot", method="GET"))

    def screenshot_of(self, *selectors: str) -> bytes:
        """The part of the page that holds these elements."""
        boxes = [self.run(BOX, selector) for selector in selectors]
        left, top = (min(box[at] for box in boxes) - 16 for at in (0, 1))
        right, bottom = (max(box[at] for box in boxes) + 16 for at in (2, 3))
        clip = {
            "x": max(0, left),
            "y": max(0, top),
            "width": min(right, self.run("return innerWidth")) - max(0, left),
            "height": bottom - top,
            "scale": 1,
        }
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def press(self, key: str) -> None:
        """A key, as the keyboard sends it."""
        code, number, text = KEYS[key]
        pressed = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        down = "keyDown" if text else "rawKeyDown"
        self.devtools("Input.dispatchKeyEvent", type=down, text=text, **pressed)
        self.devtools("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def wait(self, script: str, wanted: Any) -> Any:
        """What the script returns, as soon as it is ``wanted``, or at last."""
        deadline = time.monotonic() + CALL_S
        while (found := self.run(script)) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def looks(self, width: int, scheme: str) -> None:
        """A screen of so many pixels, light or dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.media("screen", {"prefers-color-scheme": scheme})

    def media(self, kind: str, features: dict[str, str]) -> None:
        """``screen`` or ``print``, and what else style sheets ask for."""
        asked = [{"name": name, "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=asked)

    def close(self) -> None:
        self._call("", method="DELETE")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is ended with its driver."""
    assert DRIVER is not None, MISSING
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    driver = subprocess.Popen([DRIVER, "--port=0"], **quiet, start_new_session=True)
    profile = tempfile.TemporaryDirectory(prefix="lockstep-browser-", ignore_cleanup_errors=True)
    try:
        port = 0
        deadline = time.monotonic() + START_S
        while not port and time.monotonic() < deadline:
            line = driver.stdout.readline()
            if "started successfully on port" in line:
                port = int(line.rstrip().rstrip(".").rpartition(" ")[2])
        session = Browser(port, profile.name)
        try:
            yield session
        finally:
            session.close()
    finally:
        os.killpg(driver.pid, signal.SIGKILL)  # and a browser that it started and did not end
        driver.wait()
        profile.cleanup()


def keep(name: str, picture: bytes) -> None:
    """A picture, where ``LOCKSTEP_SCREENSHOTS`` names a directory."""
    if kept := os.environ.get("LOCKSTEP_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        (Path(kept) / f"report-{name}.png").write_bytes(picture)
