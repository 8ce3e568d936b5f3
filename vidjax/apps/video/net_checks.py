"""Checks and describes the nets in a folder for `vidjax check`.

The card of a net, a JSON file, contains numbers of the output for a test input. The check compares
them with the output of the net, measures the speed of the net, and describes the card. A child
process with limits runs each net, because a stranger may have made the net.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vidjax.apps import cards
from vidjax.apps.cards import BackEnd
from vidjax.apps.video import nets
from vidjax.apps.video.net_families import CPU_SECONDS, MEMORY_BYTES
from vidjax.utils import processes
from vidjax.utils.errors import warn

REPEATS = 5  # the fastest of these calls is reported
FRAME = 640  # pixels of the sides of the image in which a detector searches
# Role -> the input of the call whose time is reported.
INPUTS: dict[cards.Role, str] = {
    "face_detector": f"frame of {FRAME} x {FRAME}", "face_embedder": "face",
    "voice_activity": "32 ms of sound", "voice_embedder": "1.6 s of sound",
}  # fmt: skip


def list_checks(folder: Path) -> dict[str, Callable[[], str]]:
    """Returns the checks of a folder of nets: name -> function.

    A function returns a description of what it has checked. It raises UserError for a fault. The
    name `models` is the check of the whole folder. Each other name is the file name of a card, a
    JSON file that describes a net, and the function tests this net.
    """
    of_nets = {x.name: partial(_describe_file, x) for x in sorted(folder.glob("*.json"))}
    return {"models": partial(_check_folder, folder), **of_nets}


def _check_folder(folder: Path) -> str:
    roles = cards.load(folder)
    if orphans := cards.list_without_card(folder):
        warn(
            f"'{orphans[0].name}' has no .json and is not used. To make a .json for it: "
            f"{cards.describe_own(orphans[0], 'FAMILY')}"
        )
    return ", ".join(f"{role} {card.file}" for role, card in roles.items()) or "no nets"


def _describe_file(path: Path) -> str:
    """Tests the net that the JSON file `path` describes; returns a text about the net."""
    card = cards.read(path)
    milliseconds = processes.run_limited(
        __name__, path, {"path": str(path)}, float, memory_bytes=MEMORY_BYTES,
        cpu_seconds=CPU_SECONDS, reads=cards.list_files(path.parent),
    )  # fmt: skip
    measured = f"; {describe_back_end(card.back_end)}" if card.back_end else ""
    return (
        f"{card.role}, {card.decoder}, from {card.source.describe()}; test passed; "
        f"{milliseconds:.3g} ms of CPU time per {INPUTS[card.role]}; "
        f"weights {card.licence.weights}{measured}"
    )


def work(arguments: dict[str, Any]) -> float:
    """Tests a net; returns its CPU time, see `measure_milliseconds`. Runs in a child process.

    `arguments` has the item `path`, the path of the net's card.
    """
    return measure_milliseconds(nets.Net(cards.read(Path(arguments["path"]))))


def measure_milliseconds(net: nets.Net) -> float:
    """Returns the CPU time of a call of a net in milliseconds: the fastest of 5 calls.

    The input is a test input of usual size, such as the image of one face, see INPUTS.
    """
    inputs = nets.make_formula_inputs(net.card, net.card.test.seed, (FRAME, FRAME))
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        net.ask(inputs)
        times.append(time.thread_time() - start)
    return 1000 * min(times)


def describe_back_end(back_end: BackEnd) -> str:
    """Returns the mean and deviation of the cosine of two faces or voices as text.

    For example: "cosine of one person 0.6 +- 0.1, of two people 0.1 +- 0.1; measured on ...".
    """
    same, different = (
        f"{mean:g} +- {spread:g}" for mean, spread in (back_end.same, back_end.different)
    )
    source = back_end.data
    if back_end.is_measured:
        pairs = " and ".join(f"{count:,}" for count in back_end.pairs)
        source = f"measured on {pairs} pairs: {source}"
    return f"cosine of one person {same}, of two people {different}; {source}"


if __name__ == "__main__":
    processes.serve(work)
