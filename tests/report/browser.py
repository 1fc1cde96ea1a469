"""A headless Chromium, driven over the WebDriver protocol: chromedriver takes JSON over HTTP on loopback."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "NOT_RUN: no chromium and chromedriver on the path (Debian: chromium, chromium-driver)"
START_S, CALL_S = 120.0, 180.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)


class Browser:
    """One session."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": list(FLAGS), "perfLoggingPrefs": {"enableNetwork": True}}
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
        return base64.b64decode(self._call("/screenshot", method="GET"))

    def looks(self, width: int, scheme: str) -> None:
        """A screen of so many pixels, light or dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=media)

    def close(self) -> None:
        self._call("", method="DELETE")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is ended with its driver."""
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = 0
        deadline = time.monotonic() + START_S
        while not port and time.monotonic() < deadline:
            line = driver.stdout.readline()
            if "started successfully on port" in line:
                port = int(line.rstrip().rstrip(".").rpartition(" ")[2])
        session = Browser(port)
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.kill()
        driver.wait()
