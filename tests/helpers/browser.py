"""A Chromium without a window, which is controlled over two pipes (the DevTools protocol)."""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Name of a key -> code for Windows, by which Chromium recognises it.
KEYS = {"Enter": 13, "Tab": 9, " ": 32, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
# Moves two pipes to 3 and 4, where the browser expects them, and becomes the browser.
START = """import os, sys
for place, pipe in enumerate(sys.argv[1:3], 3):
    os.dup2(int(pipe), place)
os.execv(sys.argv[3], sys.argv[3:])
"""
TEXTS = {"Enter": "\r", " ": " "}


class Browser:
    """A browser with one page. Use it as a context manager."""

    def __init__(self, folder):
        (read, out), (into, write) = os.pipe(), os.pipe()
        # The pipes must not be at 3 and 4 yet.
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write))
        words = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--hide-scrollbars", f"--user-data-dir={folder}", "about:blank")  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(read), str(write), str(CHROMIUM), *words],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self._out, self._in, self._unread = os.fdopen(out, "wb", 0), into, b""
        self._numbers, self._session = itertools.count(1), None
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._out.close()
        os.close(self._in)

    def call(self, method, **params) -> Any:
        """Calls a method of the DevTools protocol; returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        answer = {}
        while answer.get("id") != number:  # other messages are events
            while b"\0" not in self._unread:
                more = os.read(self._in, 1 << 16)
                assert more, "the browser has ended"
                self._unread += more
            text, _, self._unread = self._unread.partition(b"\0")
            answer = json.loads(text)
        assert "result" in answer, (method, answer)
        return answer["result"]

    def run(self, script) -> Any:
        """Evaluates JavaScript on the page, waits for a promise, and returns its value."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script, seconds=60.0):
        """Waits until JavaScript is true."""
        start = time.perf_counter()
        while not self.run(script):
            assert time.perf_counter() - start < seconds, script
            time.sleep(0.005)

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def press(self, key, shift=False):
        about = {"key": key, "code": "Space" if key == " " else key, "modifiers": 8 * shift,
                 "windowsVirtualKeyCode": KEYS[key]}  # fmt: skip
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text):
        self.call("Input.insertText", text=text)
