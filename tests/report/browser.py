"""A real Chromium, told what to do over its own pipe: no port, and no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")

_MESSAGES = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


class Browser:
    """One page. Everything that it says on its console, and every address that it asks for, is kept."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs, ours = os.pipe()
        back, answer = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --remote-debugging-pipe"
        )
        command = f'exec "$0" {options} --user-data-dir="$1" about:blank 3<&{theirs} 4>&{answer}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, str(profile)],
            pass_fds=(theirs, answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answer)
        self._write, self._read = os.fdopen(ours, "wb", 0), os.fdopen(back, "rb", 0)
        self._rest, self._number, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                answer: dict[str, Any] = found["result"]
                return answer
            self._events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read.fileno(), 1 << 16)
            assert piece, "Chromium is gone"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The value of ``expression`` once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.ask(expression):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not true within {seconds} s: {expression}; {self.said()}")

    def open(self, path: Path, width: int = 1200, height: int = 900, *, dark: bool = False) -> int:
        """Open a page, and return after how many milliseconds it was ready."""
        self._events.clear()
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        return int(self.wait("(document.documentElement || {dataset: {}}).dataset.ready"))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def draw_all(self) -> None:
        """Have every chart drawn, by a window that is as high as the page."""
        width = self.ask("innerWidth")
        self.resize(width, min(16_000, self.ask("document.documentElement.scrollHeight") + 400))
        self.wait("[...document.querySelectorAll('figure.chart')].every((one) => one.dataset.drawn)")

    def said(self) -> list[str]:
        """What the page wrote on the console, and what it threw."""
        return [json.dumps(event["params"])[:800] for event in self._events if event["method"] in _MESSAGES]

    def asked(self) -> list[str]:
        """The addresses that the page asked for, but for itself and what lies in it."""
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent if params.get("type") != "Document"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        for kind in ("keyDown", "keyUp"):
            given = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            self.call(
                "Input.dispatchKeyEvent", **given, **({"text": text} if text and kind == "keyDown" else {})
            )

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(20)
        self._write.close()
        self._read.close()
