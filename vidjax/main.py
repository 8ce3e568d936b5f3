"""The command line: flags to a mode, and errors short enough to read.

At the top are imports of the standard library alone, and every function imports what it needs: a
mistake in the words is reported before the libraries, which take seconds, are loaded.
"""

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from vidjax.command_line import Arguments
    from vidjax.config import Config
    from vidjax.data.clips import TrainingData


QUIET = "TQDM_DISABLE"  # the variable of tqdm that leaves bars out


def run() -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    # Before the imports that take seconds; training handles signals by itself.
    signal.signal(signal.SIGINT, _stop_at_once)
    signal.signal(signal.SIGTERM, _stop_at_once)
    warnings.simplefilter("ignore")  # warnings of libraries are meant for programmers
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    exit_code = main()
    gc.freeze()  # leaves out the last garbage collection, which takes over a second
    sys.exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 success, 2 a mistake of the user or in the data, 3 no usable checkpoint (in a check: a damaged
    one), 130 and 143 stopped by SIGINT and SIGTERM.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from vidjax import command_line

        args = command_line.parse(words)
        with _quietly() if args.quiet else contextlib.nullcontext():
            return RUNNERS[args.mode](args)
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except Exception as error:
        code = exit_code(error)
        if "--debug" in words or code is None:
            traceback.print_exc()
        else:
            _complain(_text(error))
        return code or 1


def _train(args: "Arguments") -> int:
    from vidjax.modes import arguments

    began = time.monotonic()
    config, path = arguments.for_training(args)
    if not (path / "config.json").exists():  # before there is a folder, or data are read
        arguments.rehearse(args)
        _set_up_devices(config)
    with _locked_folder(path) as workdir:
        from vidjax.modes import train
        from vidjax.report import run_page
        from vidjax.run import results as results_lib

        results = train.finished(workdir, config)
        finished_before = results is not None
        if results is None:
            _set_up_devices(config)
            data = arguments.load_data(config)
            results = train.train(
                config, workdir, data, analyse=config.eval.report, command=args.command,
                began=began,
            )  # fmt: skip
        elif config.eval.report and not (workdir / results_lib.REPORT).exists():
            run_page.write(workdir)  # an earlier process stopped just before
    seconds = None if finished_before else results["seconds"]
    _summarise(args, config, workdir, results, seconds, finished_before=finished_before)
    return 0


def _evaluate(args: "Arguments") -> int:
    from vidjax.modes import arguments

    began = time.monotonic()
    config, path = arguments.for_evaluation(args)
    if args.overrides and not config.join.runs:
        arguments.rehearse(args)
    with _locked_folder(path) as workdir:
        from vidjax.modes import blend, evaluate

        _set_up_devices(config)
        if config.join.runs:
            results = blend.blend_runs(config, workdir, arguments.load_data)
        else:
            evaluate.check_folder(config, workdir)
            data = arguments.load_data(config)
            results = evaluate.evaluate(config, workdir, data, analyse=config.eval.report)
    _summarise(args, config, workdir, results, time.monotonic() - began)
    return 0


def _report(args: "Arguments") -> int:
    from vidjax.modes import arguments

    workdir = arguments.for_report(args)
    from vidjax.report import run_page

    page = run_page.write(workdir)
    _tell(args, f"report: {page}", {"workdir": str(workdir), "report": str(page)})
    return 0


def _config(args: "Arguments") -> int:
    from vidjax.modes import arguments, show_config

    config, file = arguments.for_display(args)
    rows = list(show_config.rows(config, args.overrides, file))
    _tell(args, show_config.text(rows), {"fields": show_config.as_json(rows)})
    return 0


def _rank(args: "Arguments") -> int:
    from vidjax.modes import arguments

    options = arguments.for_ranking(args)
    from vidjax.modes import rank

    rank.check_out(options.out)  # before what takes seconds
    from vidjax import predict
    from vidjax.data.unlabelled import load_clips

    run = predict.restore(options.workdir, step=options.step)
    clips = load_clips(
        options.input,
        run.modalities,
        run.identities,
        split=options.split,
        quality=run.config.data.quality,
    )
    rank.write(options.out, run.rank(clips))
    rows = {"clips": f"{len(clips.names):,}", "identities": f"{len(run.identities):,}"}
    rows["ranking"] = arguments.shown(options.out)
    text = "\n".join(["rank", *(f"  {name:10}  {value}" for name, value in rows.items())])
    content = {"workdir": str(run.workdir), "ranking": str(options.out.absolute())}
    counts = {"num_clips": len(clips.names), "num_identities": len(run.identities)}
    _tell(args, text, content | counts)
    return 0


def _compare(args: "Arguments") -> int:
    from vidjax.modes import arguments

    comparison = arguments.for_comparison(args)
    from vidjax.modes import compare
    from vidjax.run import workdir as workdir_lib

    def load(config: "Config") -> "TrainingData":
        config.data.cache_dir = comparison.cache_dir or config.data.cache_dir
        return arguments.load_data(config)

    workdir = workdir_lib.make_workdir(comparison.workdir)
    with workdir_lib.lock(workdir):
        table = compare.compare(
            comparison.runs,
            workdir,
            load,
            split=comparison.split,
            directory=comparison.directory,
        )
    page = f"{arguments.shown(workdir)}/comparison.html"
    _tell(args, f"{table}\ncomparison: {page}, .md, .csv", {"comparison": page, "table": table})
    return 0


def _check(args: "Arguments") -> int:
    from vidjax.modes import arguments

    config, workdir = arguments.for_check(args)
    # An accelerator may be at work on the run that is checked.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.modes import check, findings

    subject = str(workdir or args.config or "the environment")
    lines = not (args.quiet or args.json)
    if lines:
        _say(f"check: {subject}")
    items = []
    for item in check.check(config, workdir):  # print each line at once: reading data takes time
        items.append(item)
        if lines or (args.quiet and not args.json and item.state != findings.OK):
            _say(f"  {item.state:7}  {item.text}")
    content = {"check": subject, "findings": [item._asdict() for item in items]}
    _tell(args, findings.verdict(items), {**content, "verdict": findings.verdict(items)})
    return findings.exit_code(items)


RUNNERS = {
    "train": _train,
    "evaluate": _evaluate,
    "rank": _rank,
    "compare": _compare,
    "report": _report,
    "check": _check,
    "config": _config,
}


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """Makes a run's folder and holds its lock."""
    from vidjax.run import signals
    from vidjax.run import workdir as workdir_lib

    if signal.getsignal(signal.SIGTERM) is _stop_at_once:
        signals.end_on_signals()
    is_new = not path.exists()
    workdir = workdir_lib.make_workdir(path)
    with workdir_lib.lock(workdir):
        try:
            yield workdir
        except BaseException:
            if is_new and len(list(workdir.iterdir())) == 1:  # nothing but the file of the lock
                shutil.rmtree(workdir)
            raise


def _set_up_devices(config: "Config") -> None:
    from vidjax import devices
    from vidjax.data.cache import default_cache_dir

    if config.deterministic:
        devices.be_deterministic()
    devices.keep_programs(Path(config.data.cache_dir or default_cache_dir()).expanduser())
    devices.make_mesh()  # an absent device is told before data are read


def _summarise(
    args: "Arguments",
    config: "Config",
    workdir: Path,
    results: Mapping[str, Any],
    seconds: float | None,
    *,
    finished_before: bool = False,
) -> None:
    """Prints the scores of a run and the files to look at."""
    from vidjax.modes import summary

    rows = summary.rows(config, workdir, results, seconds)
    heading = args.mode
    if finished_before:
        heading += ": finished before, nothing was trained now"
    text = "\n".join([heading, *(f"  {name:10}  {value}" for name, value in rows.items())])
    content = {"workdir": str(workdir), **summary.files(config, workdir)}
    content |= {"finished_before": finished_before, "metrics": dict(results)}
    _tell(args, text, content)


def _tell(args: "Arguments", text: str, content: Mapping[str, Any]) -> None:
    """Prints the result of a command: the text, or with `--json` the content as one line."""
    if not args.json:
        _say(text)
        return
    from vidjax.modes import summary

    _say(summary.to_json({"mode": args.mode, **content}))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Leaves out progress and messages, but no warning."""
    log = logging.getLogger("vidjax")
    before, level = os.environ.get(QUIET), log.level
    os.environ[QUIET] = "1"
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        os.environ.pop(QUIET)
        if before is not None:
            os.environ[QUIET] = before


def _say(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader has seen enough, as `| head -1` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """Prints at most three lines of an error or a warning."""
    lines = [line for line in text.splitlines() if line.strip()] or ["unknown error"]
    print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), file=sys.stderr)  # noqa: T201


def _text(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package '{error.name}' is missing or broken: pip install 'vidjax[train]' "
            "installs what training, evaluation and reports need"
        )
    if _is_memory(error):
        reason = (str(error) or "no more is free").splitlines()[0][:200]
        return (
            f"the memory is exhausted: {reason}\n"
            "take fewer clips at a time: --config.batch_size=32, --config.eval.block_size=64,\n"
            "fewer frames: --config.data.max_frames=32, or clips from disk: "
            "--config.data.mode=streaming"
        )
    return str(error)


def _is_memory(error: Exception) -> bool:
    """Returns True if the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, (ValueError, OSError)) or _is_memory(error):
        return 2  # before the imports below, which take a second

    from vidjax.run.checkpoint import CheckpointError
    from vidjax.run.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code
    return 3 if isinstance(error, CheckpointError) else None


def _show_warning(message: object, *args: object, **kwargs: object) -> None:
    del args, kwargs  # the place in the code
    _complain(f"warning: {message}")


def _stop_at_once(signum: int, frame: object) -> None:
    del frame
    # Not an exception: one that is raised within an import or a library's callback is lost there.
    os.write(2, b"vidjax: stopped\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    run()
