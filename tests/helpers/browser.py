"""Chromium without a window: `python -m tests.helpers.browser PAGE PICTURE`.

The command makes the picture of the main README from the report of its first command:

    python -m tests.helpers.browser runs/mma/report.html colab/report.png
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


def browse(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Chromium with a profile in a folder; the result holds what it prints."""
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def main(argv: Sequence[str]) -> None:
    """Writes the top of a page as PNG."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.browser")
    parser.add_argument("page", type=Path, help="a report")
    parser.add_argument("picture", type=Path, help="the PNG")
    parser.add_argument("--width", type=int, default=1280, help="pixels")
    parser.add_argument("--height", type=int, default=1280, help="pixels")
    parser.add_argument("--dark", action="store_true", help="dark colours")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as profile:
        done = browse(
            Path(profile),
            f"--window-size={args.width},{args.height}",
            f"--screenshot={args.picture.absolute()}",
            "--hide-scrollbars",
            *(("--blink-settings=preferredColorScheme=0",) if args.dark else ()),
            args.page.absolute().as_uri(),
        )
    if not args.picture.is_file():
        raise SystemExit(f"no picture of '{args.page}': {done.stderr[-500:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
