"""A headless Chromium, spoken to over its debugging pipe: opens a page, asks it questions, takes pictures of it."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BINARY = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-pipe", "--hide-scrollbars", "--mute-audio"),
)
PATIENCE = 60.0  # seconds for one answer


class Browser:
    """One Chromium with one page; close it when done."""

    def __init__(self, profile: Path) -> None:
        assert BINARY is not None, "there is no Chromium: apt-get install chromium"
        theirs_in, self.outgoing = os.pipe()
        self.incoming, theirs_out = os.pipe()
        # the pipe's ends must be 3 and 4 there: they are moved out of the way of those numbers first
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        command = [BINARY, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "browser", *command],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.held, self.count, self.events = b"", 0, list[dict[str, Any]]()
        self.session: str | None = None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(OSError, TimeoutError, EOFError):
            self.session = None
            self.send("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.outgoing)
        os.close(self.incoming)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its answer; events that come meanwhile are kept."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer.get("result", {})
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.held:
            if not select.select([self.incoming], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self.incoming, 1 << 20)
            if not chunk:
                raise EOFError("Chromium has closed the pipe")
            self.held += chunk
        first, _, self.held = self.held.partition(b"\0")
        return json.loads(first)

    # --- the page -----------------------------------------------------------------------------------------------------

    def resize(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Makes the viewport so wide, as a phone's would be below 700."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> float:
        """Opens a file and returns the seconds until it was loaded and drawn."""
        self.events.clear()
        start = time.perf_counter()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.send("Page.captureScreenshot")  # an answer comes when a frame was drawn, with the page's script or without
        return time.perf_counter() - start

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page (a promise is waited for)."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses and releases a key."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the page was opened."""
        self.ask("1")  # what was said before has arrived by then
        found = []
        for event in self.events:
            told = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(told["exceptionDetails"]["text"])
            if event.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            if event.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
        return found

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def picture(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def paper(self, path: Path) -> None:
        """Writes the page as it is printed."""
        made = self.send("Page.printToPDF", printBackground=False)
        path.write_bytes(base64.b64decode(made["data"]))
