"""Flags that several commands share, and their checks."""

import argparse
from typing import Any

from vidjax.utils import distributed
from vidjax.utils.errors import UserError
from vidjax.utils.parser import Parser
from vidjax.utils.rendezvous import TIMEOUT_SECONDS as TIMEOUT

PROCESSES = ("coordinator", "num_processes", "process_id")


def add_workdir(parser: Parser) -> None:
    """Adds the required flag `--workdir`."""
    parser.flag("--workdir FOLDER", "the folder of a trained run", required=True)


def add_config(parser: Parser, **options: Any) -> None:  # noqa: ANN401 (the options of a flag)
    """Adds the flag `--config`: the file or the name of a configuration, such as `mma`."""
    about = "a file of configs/ or its name, e.g. mma or mma:iqiyi_vid; or a run's config.json"
    parser.flag("--config FILE[:ARG,...]", about, **options)


def add_definitions(parser: Parser) -> None:
    """Adds the flag `--config`, which names a file that defines more models or losses."""
    about = "the Python file that defines the model or the loss, if vidjax does not define it"
    parser.flag("--config FILE", about)


def load_definitions(args: argparse.Namespace) -> str | None:
    """Runs the Python file of `--config`, which may define more models and losses.

    Returns the field `model.name` of the file's configuration, or None without `--config`.
    """
    if not args.config:  # a path in the folder of a run is never run: it may come from a stranger
        return None
    from vidjax.runs import config_io

    return config_io.load_file(str(args.config)).model.get("name")


def add_processes(parser: Parser) -> None:
    """Adds the flags that join several processes to a single run."""
    about = "the address of the first process, if several run together; see configs/README.md"
    parser.flag("--coordinator HOST:PORT", about)
    parser.flag("--num_processes N", "the number of processes that run together", type=int)
    parser.flag("--process_id I", "the index of this process; the first has 0", type=int)
    about, seconds = "how long to wait for the other processes (default: %(default)s)", TIMEOUT
    parser.flag("--coordinator_timeout SECONDS", about, type=float, default=seconds)


def join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of a run, if --coordinator is set. Call this before using JAX."""
    given: dict[str, Any] = {name: getattr(args, name, None) for name in PROCESSES}
    if all(value is None for value in given.values()):
        return
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise UserError(
            f"a run of several processes also needs {', '.join(missing)}\n"
            "give each process --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    distributed.join(**given, coordinator_timeout=args.coordinator_timeout)
