"""Flags that several commands share, and their checks."""

import argparse

from vidjax.utils import rendezvous
from vidjax.utils.errors import UserError
from vidjax.utils.parser import Parser

PROCESSES = ("coordinator", "num_processes", "process_id")
MAX_WAIT_SECONDS = 7 * 24 * 3600


def add_workdir(parser: Parser, about: str = "the folder of a trained run") -> None:
    """Adds the required flag `--workdir`. `about` is the help text."""
    parser.add_argument("--workdir", metavar="FOLDER", required=True, help=about)


def add_config(parser: Parser, *, required: bool = False) -> None:
    """Adds the flag `--config`, which names the file of a configuration."""
    about = "a file of configs/ or its name, e.g. mma or mma:iqiyi_vid; or a run's config.json"
    parser.add_argument("--config", metavar="FILE[:ARG,...]", required=required, help=about)


def add_definitions(parser: Parser) -> None:
    """Adds the flag `--config`, which names a file that defines additional models or losses."""
    about = "the Python file that defines the model or the loss, if vidjax does not define it"
    parser.add_argument("--config", metavar="FILE", help=about)


def load_definitions(args: argparse.Namespace) -> str | None:
    """Runs the Python file of `--config`, which may define additional models and losses.

    The configuration that the file returns is not used. Returns the name of its model.
    """
    if not args.config:  # a path in the folder of a run is never run: it may come from a stranger
        return None
    from vidjax.runs import config_io

    return config_io.load_file(args.config).model.get("name")


def add_processes(parser: Parser) -> None:
    """Adds the flags that join several processes to a single run."""
    about = "the address of the first process, if several run together; see configs/README.md"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=about)
    about = "the number of processes that run together"
    parser.add_argument("--num_processes", type=int, metavar="N", help=about)
    about = "the index of this process; the first has 0"
    parser.add_argument("--process_id", type=int, metavar="I", help=about)
    about = "how long to wait for the other processes (default: %(default)s)"
    parser.add_argument(
        "--coordinator_timeout", type=float, metavar="SECONDS", help=about,
        default=rendezvous.TIMEOUT_SECONDS,
    )  # fmt: skip


def join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of a run, if --coordinator is set. Call this before using JAX."""
    given = {name: getattr(args, name, None) for name in PROCESSES}
    if all(value is None for value in given.values()):
        return
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        raise UserError(
            f"a run of several processes also needs {', '.join(missing)}\n"
            "give each process --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--coordinator={args.coordinator} is not an address: write HOST:PORT, such as "
            "--coordinator=a:9876"
        )
    count, index, seconds = args.num_processes, args.process_id, args.coordinator_timeout
    if count < 1:
        raise UserError(f"--num_processes={count}: give the number of all processes, 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} is not the index of one of {count} processes\n"
            f"give --process_id=0 to {count - 1}, and each to one process"
        )
    if not 0 < seconds <= MAX_WAIT_SECONDS:
        raise UserError(
            f"--coordinator_timeout={seconds:g} is not a duration: give seconds, up to a week"
        )
    rendezvous.meet(args.coordinator, count, index, seconds)
    import jax

    # The service would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(args.coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--coordinator={args.coordinator}: cannot join the other processes: {reason}\n"
            "name the machine of process 0 and a free port"
        ) from error


def split_runs(runs: str) -> list[str]:
    """Splits the value of `--runs=A,B` into the folders of runs."""
    return [name.strip() for name in runs.split(",") if name.strip()]


def check_fields(args: argparse.Namespace, readable: tuple[str, ...]) -> set[str]:
    """Returns the names of the fields that words `--config.FIELD=VALUE` override.

    Raises UserError for a field that is not in `readable`, because the command would ignore it.
    """
    from vidjax.runs import config_io

    overridden = set(config_io.override_names(args.overrides))
    if unread := sorted(overridden - set(readable)):
        raise UserError(
            f"config.{unread[0]} has no effect, because {args.command} does not read it\n"
            f"choose from {', '.join(f'--config.{name}' for name in readable)}"
        )
    return overridden
