"""Chromium without a window.

The picture of the main README is made from the report of its first command:

    chromium --headless --window-size=1280,1280 --screenshot=colab/report.png runs/mma/report.html
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr",
)  # fmt: skip


def browse(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Chromium with a profile in a folder; the result holds what it prints."""
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Tab:
    """A page in Chromium, used by keyboard; it talks through two pipes, see `open_tab`."""

    def __init__(self, read: int, write: int):
        self._read, self._write = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb")
        self._number, self._rest, self._session = 0, b"", {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}

    def close(self) -> None:
        self._read.close()
        with contextlib.suppress(BrokenPipeError):
            self._write.close()

    def send(self, method: str, **params: Any) -> Any:
        """Calls a method of the DevTools protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            while b"\0" not in self._rest:
                piece = self._read.read(1 << 16)
                assert piece, "Chromium has ended"
                self._rest += piece
            answer, _, self._rest = self._rest.partition(b"\0")
            content = json.loads(answer)
            if content.get("id") == self._number:
                return content["result"]

    def ask(self, script: str) -> Any:
        """Returns the value of a script in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Waits until a script gives something that is true."""
        end = time.monotonic() + 60
        while not self.ask(script):
            assert time.monotonic() < end, (script, self.ask("document.body.innerText"))
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Presses keys, such as `Enter` and `shift Tab`, or types a word."""
        codes = {"Tab": 9, "Enter": 13}
        for key in keys:
            shift, name = key.startswith("shift "), key.removeprefix("shift ")
            if name not in codes:
                self.send("Input.insertText", text=name)
                continue
            words = {"key": name, "windowsVirtualKeyCode": codes[name], "modifiers": 8 * shift}
            text = {"text": "\r"} if name == "Enter" else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **words, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **words)


@contextlib.contextmanager
def open_tab(profile: Path) -> Iterator[Tab]:
    """Yields a page in a new Chromium, with a profile in a folder."""
    (theirs, write), (read, answers) = os.pipe(), os.pipe()
    words = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # Chromium reads from 3 and writes to 4.
    command = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", *words]
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(command, pass_fds=(theirs, answers), stderr=log)
    os.close(theirs)
    os.close(answers)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        tab = Tab(read, write)
        stack.callback(tab.close)
        yield tab
