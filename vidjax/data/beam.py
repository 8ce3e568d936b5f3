"""Work that Apache Beam distributes, on a cluster or on this machine (extra `[beam]`).

The workers need vidjax, and the files of the work at the same path: results are files, too, and
nothing is sent back.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vidjax.data.untrusted.names import show
from vidjax.errors import DiskError, UserError, need

if TYPE_CHECKING:
    from apache_beam import Pipeline  # pyright: ignore[reportMissingImports]

FLAG = "--beam_options"
LOCAL_RUNNER = "FnApiRunner"
# With or without the end of their names.
DOWNLOADING = {"directrunner", "direct", "prismrunner", "prism", "switchingdirectrunner"}


class Beam(NamedTuple):
    """Apache Beam with `options`, NAME=VALUE,NAME=VALUE as in `tfds build --beam_pipeline_options`.

    Without `runner`, LOCAL_RUNNER runs on this machine.
    """

    options: str

    def flags(self) -> list[str]:
        """Returns the options as flags; adds LOCAL_RUNNER where they name no runner."""
        flags = [f"--{option.strip()}" for option in self.options.split(",") if option.strip()]
        for flag in flags:  # Beam ignores the case of these names, and what stands before a dot
            runner = flag.partition("=")[2].rpartition(".")[2].lower()
            if flag.startswith("--runner=") and runner in DOWNLOADING:
                raise UserError(
                    f"{FLAG}={self.options}: {flag[2:]} looks for a program on the internet\n"
                    f"on this machine: runner={LOCAL_RUNNER}"
                )
        if not any(flag.startswith("--runner=") for flag in flags):
            flags.append(f"--runner={LOCAL_RUNNER}")
        return flags

    def check(self) -> None:
        """Raises UserError if Beam is not installed, or does not know the runner."""
        flags = self.flags()
        need(FLAG, "apache_beam", extra="beam")
        try:
            _make_pipeline(flags)
        except (ValueError, ImportError) as error:  # an unknown runner, or one with an extra
            raise UserError(f"{FLAG}={self.options}: {show(str(error))}") from None

    def run(self, elements: Sequence[str], start: Callable[[], Callable[[str], None]]) -> None:
        """Calls the result of `start` for each of the elements, on any worker and in any order.

        Each worker calls `start` once.

        Raises:
          DiskError: a call has failed; the last line of its traceback.
        """
        with _quiet():
            import apache_beam as beam  # pyright: ignore[reportMissingImports]

        class Work(beam.DoFn):
            def setup(self) -> None:
                self.work = start()

            def process(self, element: str) -> None:
                self.work(element)

        try:
            with _make_pipeline(self.flags()) as pipeline:
                # Reshuffled, or one worker would take all.
                _ = pipeline | beam.Create(elements) | beam.Reshuffle() | beam.ParDo(Work())
        except RuntimeError as error:  # with the traceback of the worker
            last = str(error).strip().rpartition("\n")[2]
            raise DiskError(f"Apache Beam stopped: {show(last)}") from error


def _make_pipeline(flags: list[str]) -> "Pipeline":
    with _quiet():
        from apache_beam import Pipeline  # pyright: ignore[reportMissingImports]
        from apache_beam.options import pipeline_options  # pyright: ignore[reportMissingImports]

    return Pipeline(options=pipeline_options.PipelineOptions(flags))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what Beam logs at its import about packages that are not installed."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
