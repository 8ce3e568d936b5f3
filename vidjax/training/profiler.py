"""Records a trace of some training steps (`config.profile`) for profilers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from vidjax.utils import distributed
from vidjax.utils.terminal import say

FOLDER = "profile"  # in the folder of a run


@contextlib.contextmanager
def trace_steps(workdir: Path, window: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Yields a function that starts and stops a trace of training steps for a profiler.

    Call the function before each step, with the number of finished steps. `window` is the pair of
    numbers at which the trace starts and stops, or () for no trace. If several processes train the
    run, the first process is traced.
    """
    folder, is_running = workdir / FOLDER, False

    def stop() -> None:
        nonlocal is_running
        is_running = False
        jax.profiler.stop_trace()
        say(f"the trace is in '{folder}': read it with xprof, TensorBoard or ui.perfetto.dev")

    def start_or_stop(step: int) -> None:
        nonlocal is_running
        if is_running and step >= window[1]:
            stop()
        elif window and not is_running and window[0] <= step < window[1] and distributed.is_first():
            jax.profiler.start_trace(folder)
            is_running = True

    try:
        yield start_or_stop
    finally:
        if is_running:
            stop()
