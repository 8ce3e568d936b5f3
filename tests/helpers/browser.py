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


def take_picture(page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Writes the top of a page as PNG.

    Args:
      page: a file of HTML.
      picture: the PNG.
      width: pixels.
      height: pixels.
      dark: True for dark colours.

    Raises:
      ValueError: Chromium wrote no picture.
    """
    with tempfile.TemporaryDirectory() as profile:
        done = browse(
            Path(profile),
            f"--window-size={width},{height}",
            f"--screenshot={picture.absolute()}",
            "--hide-scrollbars",
            *(("--blink-settings=preferredColorScheme=0",) if dark else ()),
            page.absolute().as_uri(),
        )
    if not picture.is_file():
        raise ValueError(f"no picture of '{page}': {done.stderr[-500:]}")


def main(argv: Sequence[str]) -> None:
    """Takes the picture that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.browser")
    parser.add_argument("page", type=Path, help="a report")
    parser.add_argument("picture", type=Path, help="the PNG")
    parser.add_argument("--width", type=int, default=1280, help="pixels")
    parser.add_argument("--height", type=int, default=1280, help="pixels")
    parser.add_argument("--dark", action="store_true", help="dark colours")
    args = parser.parse_args(argv)
    take_picture(args.page, args.picture, width=args.width, height=args.height, dark=args.dark)


if __name__ == "__main__":
    main(sys.argv[1:])
