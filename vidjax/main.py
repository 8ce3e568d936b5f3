"""The command line: flags to a mode, and errors short enough to read."""

import argparse
import difflib
import gc
import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def _stop_at_once(signum: int, frame: Any) -> None:
    del frame
    # Not an exception: one that lands within an import or a callback of a library is lost there.
    os.write(2, b"vidjax: stopped\n")
    os._exit(128 + signum)


if __name__ == "__main__":  # before the imports that take seconds; the loop has its own handler
    signal.signal(signal.SIGINT, _stop_at_once)
    signal.signal(signal.SIGTERM, _stop_at_once)

from vidjax import config as config_lib  # noqa: E402
from vidjax.config import Config  # noqa: E402

MODES = ("train", "evaluate", "compare", "report", "check")
FLAGS = ("--config", "--workdir", "--mode", "--runs", "--debug", "--help")

USAGE = """\
python -m vidjax.main [--mode=M] [--config=FILE[:ARG,...]] [--workdir=W]
                             [--runs=A,B] [--config.FIELD=VALUE ...]"""
DESCRIPTION = """\
Identify people in video: train a system on frame features, rank the clips of
every identity.

modes:
  train     trains a system, evaluates it, writes a report; needs --config
  evaluate  ranks a split with a trained run, or with several joined
  compare   says how far apart runs are, and how sure that is
  report    writes report.html anew, the page of what a run left
  check     reads everything and changes nothing: environment, data, results
"""
EXAMPLES = """\
examples:
  a result in a minute, on synthetic clips
    python -m vidjax.main --config=configs/mma.py
  train on official files
    python -m vidjax.main --config=configs/mma.py:iqiyi_vid \\
        --config.data.dir=PATH
  rank another split with a trained run
    python -m vidjax.main --mode=evaluate --workdir=runs/mma \\
        --config.eval.split=test
  rank a split with two runs together
    python -m vidjax.main --mode=evaluate --workdir=runs/both \\
        --runs=runs/mma,runs/deepmef
  is the second run better than the first?
    python -m vidjax.main --mode=compare --workdir=runs/two \\
        --runs=runs/mma,runs/deepmef
  is everything in order, in a run or in data to train on?
    python -m vidjax.main --mode=check --workdir=runs/mma
    python -m vidjax.main --mode=check --config=configs/mma.py:iqiyi_vid \\
        --config.data.dir=PATH

Configurations, their arguments and all fields: README.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 success, 2 a mistake of the user or in the data, 3 no usable checkpoint (of a check: a damaged
    one), 130 and 143 stopped by SIGINT and SIGTERM.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        args = _parse(words)
        modes = {"check": _check, "compare": _compare, "report": _report}
        return modes.get(args.mode, _run)(args)
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except Exception as error:
        code = _exit_code(error)
        if debug or code is None:
            traceback.print_exc()
        else:
            _complain(_text(error))
        return code or 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # argparse would print the usage and leave the process
        raise ValueError(message)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m vidjax.main",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode", metavar="M", default="train", help="what to do, one of the above (default: train)"
    )
    parser.add_argument("--config", metavar="FILE[:ARG,...]", help="an experiment of configs/")
    parser.add_argument(
        "--workdir", metavar="W", help="the run's folder (default of train: runs/NAME)"
    )
    parser.add_argument("--runs", metavar="A,B", help="folders of runs, to join or to compare")
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        dest="ignored",
        help="overrides a field, e.g. --config.seed=1",
    )
    parser.add_argument("--debug", action="store_true", help="shows tracebacks")
    own, overrides = [], []
    command = shlex.join(["python", "-m", "vidjax.main", *words])
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            own.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            overrides.append(f"{word}={words.pop(0)}")
        else:
            overrides.append(word)
    for word in own:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in (*FLAGS, "-h"):
            name, fields = flag.lstrip("-"), dict(config_lib.fields(config_lib.default()))
            close = difflib.get_close_matches(f"--{name}", FLAGS, n=1) or [
                f"--config.{field}"
                for field in fields
                if field.rsplit(".", 1)[-1] == name or difflib.get_close_matches(name, [field])
            ]
            hint = f": did you mean {close[0]}?" if close else "; --help lists them"
            raise ValueError(f"no flag {flag}{hint}")
    args, strays = parser.parse_known_args(own)
    if strays:
        word, hint = strays[0], "; --help lists the flags"
        if args.runs is not None and args.runs.endswith(","):
            hint = f": no blank after a comma, --runs={args.runs}{word}"
        elif word in MODES or word.partition(":")[0].endswith(".py"):
            hint = f": did you mean --{'mode' if word in MODES else 'config'}={word}?"
        raise ValueError(f"stray word '{word}'{hint}")
    if args.mode not in MODES:
        close = difflib.get_close_matches(args.mode, MODES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(MODES)}"
        raise ValueError(f"no mode '{args.mode}': {hint}")
    if args.workdir == "":
        raise ValueError("--workdir= is empty: name a folder")
    args.overrides, args.command = overrides, command
    return args


def _run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    config, path = _train_config(args) if args.mode == "train" else _workdir_config(args)

    # The folder before the imports of `_results`, which take seconds.
    from vidjax.run import signals
    from vidjax.run import workdir as workdir_lib

    if signal.getsignal(signal.SIGTERM) is _stop_at_once:
        signals.end_on_signals()
    workdir = workdir_lib.make_workdir(path)
    with workdir_lib.lock(workdir):
        results = _results(args, config, workdir)
    _summarise(args.mode, config, workdir, results, time.monotonic() - began)
    return 0


def _results(args: argparse.Namespace, config: Config, workdir: Path) -> dict[str, Any]:
    from vidjax import devices
    from vidjax.data.records.manifest import default_cache_dir
    from vidjax.modes import blend, evaluate, train
    from vidjax.run import results as results_lib

    if config.deterministic:
        devices.be_deterministic()
    devices.keep_programs(Path(config.data.cache_dir or default_cache_dir()).expanduser())
    if args.mode == "train":
        done = train.finished(workdir, config)
        if done is None:
            data = _load(config)
            done = train.train(
                config, workdir, data, analyse=config.eval.report, command=args.command
            )
            return done
        # A process may have stopped just before it.
        if config.eval.report and not (workdir / results_lib.REPORT).exists():
            from vidjax.report import run_page

            run_page.write(workdir)
        return done
    if config.join.runs:
        results = blend.blend_runs(config, workdir, _load)
    else:
        data = _load(config)
        results = evaluate.evaluate(config, workdir, data, analyse=config.eval.report)
    return results


def _report(args: argparse.Namespace) -> int:
    if not args.workdir:
        raise ValueError("--mode=report needs --workdir=FOLDER, that of a run")
    if args.config or args.runs is not None or args.overrides:
        raise ValueError("--mode=report takes --workdir alone: it shows what lies there")
    from vidjax.report import run_page

    workdir = Path(args.workdir).expanduser().absolute()
    _config_of(workdir)
    path = run_page.write(workdir)
    print(f"report: {path}")  # noqa: T201
    return 0


def _compare(args: argparse.Namespace) -> int:
    if not args.workdir:
        raise ValueError("--mode=compare needs --workdir=FOLDER, where the comparison is written")
    if args.config:
        raise ValueError("--mode=compare reads trained runs: --runs=A,B, not --config")
    runs = _folders(args.runs)
    if len(runs) < 2:
        raise ValueError(
            "--mode=compare needs --runs=A,B: folders of two runs or more, split by commas\n"
            "all others are compared with the first"
        )
    allowed = ("eval.split", "data.dir", "data.cache_dir")
    given = {word.removeprefix("--config.").partition("=")[0] for word in args.overrides}
    config = config_lib.override(config_lib.default(), args.overrides)
    if given - set(allowed):
        raise ValueError(
            f"--mode=compare computes nothing anew: config.{min(given - set(allowed))} says "
            f"nothing here\nknown are {', '.join(f'--config.{name}' for name in allowed)}"
        )
    from vidjax.modes import compare
    from vidjax.run import workdir as workdir_lib

    def load(of_run: Config) -> Any:
        of_run.data.cache_dir = config.data.cache_dir or of_run.data.cache_dir
        return _load(of_run)

    workdir = workdir_lib.make_workdir(args.workdir)
    with workdir_lib.lock(workdir):
        table = compare.compare(
            runs,
            workdir,
            load,
            split=config.eval.split if "eval.split" in given else None,
            directory=config.data.dir,
        )
    print(table)  # noqa: T201
    print(f"comparison: {_shown(workdir)}/comparison.html, .md, .csv")  # noqa: T201
    return 0


def _check(args: argparse.Namespace) -> int:
    config, workdir = _check_config(args)

    # An accelerator may be at work on the run that is looked at.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.modes import check

    print(f"check: {workdir or args.config or 'the environment'}")  # noqa: T201
    items = []
    for item in check.check(config, workdir):  # a line as soon as it is known: reading takes time
        items.append(item)
        print(f"  {item.state:7}  {item.text}", flush=True)  # noqa: T201
    print(check.verdict(items))  # noqa: T201
    return check.exit_code(items)


def _train_config(args: argparse.Namespace) -> tuple[Config, str]:
    if args.runs is not None:
        raise ValueError(
            "--runs takes trained runs: it goes with --mode=evaluate, which joins them,\n"
            "or with --mode=compare"
        )
    if not args.config:
        raise ValueError("--mode=train needs --config=FILE, e.g. --config=configs/mma.py")
    config = config_lib.override(_load_file(args.config), args.overrides)
    name, _, words = args.config.partition(":")
    default = "-".join([Path(name).stem, *(word for word in words.split(",") if word)])
    return config, args.workdir or f"runs/{default}"


def _workdir_config(args: argparse.Namespace) -> tuple[Config, str]:
    if not args.workdir:
        raise ValueError(f"--mode={args.mode} needs --workdir=FOLDER, that of a trained run")
    if args.config:
        raise ValueError(f"--mode={args.mode} takes its configuration from --workdir, not --config")
    workdir = Path(args.workdir).expanduser()
    runs = tuple(str(Path(name).expanduser().absolute()) for name in _folders(args.runs))
    if args.runs is None:
        config = _config_of(workdir)
    elif not runs:
        raise ValueError("--runs= is empty: name two runs or more")
    else:
        config = config_lib.default()
        config.join.runs = runs
        if (workdir / "config.json").exists():
            there = config_lib.load_workdir(workdir).join.runs
            if tuple(there) != runs:
                what = "joins other runs" if there else "is a run of its own"
                raise ValueError(f"--workdir: '{args.workdir}' {what}: use another folder")
    return config_lib.override(config, args.overrides), args.workdir


def _config_of(workdir: Path) -> Config:
    """Returns the configuration of the run in a folder; where there is none, what makes one."""
    try:
        return config_lib.load_workdir(workdir)
    except ValueError as error:
        if (workdir / "config.json").is_file():
            raise
        found = sorted(path.parent for path in workdir.glob("*/config.json"))
        hint = f"train one: python -m vidjax.main --config=FILE --workdir={_shown(workdir)}"
        if found:
            hint = f"there are runs in it: {', '.join(_shown(path) for path in found[:3])}"
        raise ValueError(f"{error}\n{hint}") from error


def _folders(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _check_config(args: argparse.Namespace) -> tuple[Config | None, Path | None]:
    """Returns what to check: a run's configuration and folder, or that of some data, or neither."""
    if args.runs is not None:
        raise ValueError("--runs goes with --mode=evaluate or compare; a check takes one --workdir")
    if args.workdir and args.config:
        raise ValueError(
            "--mode=check takes --workdir=FOLDER, or --config=FILE for its data alone: not both"
        )
    if args.config:
        return config_lib.override(_load_file(args.config), args.overrides), None
    if not args.workdir:
        if args.overrides:
            raise ValueError("--mode=check with fields needs --workdir=FOLDER or --config=FILE")
        return None, None
    workdir = Path(args.workdir).expanduser().absolute()
    try:
        config = _config_of(workdir)
    except ValueError:
        if not (workdir / "config.json").is_file():
            raise
        return None, workdir  # damaged: the check says so, among the rest
    return config_lib.override(config, args.overrides), workdir


def _load_file(spec: str) -> Config:
    """Returns the configuration of a file, whose own mistakes are the user's."""
    name, _, words = spec.partition(":")
    there = Path("configs", Path(name).name).with_suffix(".py")
    if not Path(name).exists() and there.exists():
        meant = f"{there}:{words}" if words else there
        raise ValueError(f"--config: no such file '{name}'\ndid you mean '{meant}'?")
    try:
        config = config_lib.load_file(spec)
    except (ValueError, OSError):
        raise
    except Exception as error:
        path = spec.partition(":")[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(Path(path).absolute())]
        line, what = lines[-1] if lines else None, str(error)
        if isinstance(error, SyntaxError):
            line, what = error.lineno, error.msg
        where = f"'{path}' line {line}" if line else f"'{path}'"
        raise ValueError(f"--config: {where}: {type(error).__name__}: {what}") from error
    if not hasattr(config, "to_dict"):
        raise ValueError(f"--config: get_config of '{spec}' returns no ConfigDict")
    return config


def _load(config: Config) -> Any:
    from vidjax.data.records import pipeline

    return pipeline.load(
        config.data.name,
        directory=config.data.dir,
        cache_dir=config.data.cache_dir,
        size=config.data.size,
        seed=config.data.seed,
        non_finite=config.data.non_finite,
    )


def _summarise(
    mode: str, config: Config, workdir: Path, results: dict[str, Any], seconds: float
) -> None:
    from vidjax import metrics
    from vidjax.run import results as results_lib

    split = config.eval.split
    paths = results_lib.paths(workdir, split, config_lib.load_workdir(workdir).eval.split)
    rows = [("workdir", _shown(workdir))]
    if "map" in results:
        kind = results["map_kind"].replace("_", " ")
        kind = split if kind in ("val", split) else f"{split}, {kind}"
        scores = [f"{results['map']:.4f} on {kind}", *metrics.describe(results)]
        rows.append(("MAP@100", "; ".join(scores)))
    else:
        rows.append(("MAP@100", f"none: {split} has no ground truth and is ranked, not scored"))
    if "best_map" in results:
        rows.append(("best", f"{results['best_map']:.4f} at step {results['best_step']:,}"))
    rows += [
        ("clips", f"{results['num_clips']:,}"),
        ("identities", f"{results['num_identities']:,}"),
        ("time", f"{seconds:.1f} s"),
        ("ranking", _shown(paths.ranking)),
    ]
    if (workdir / results_lib.REPORT).exists():
        rows.append(("report", _shown(workdir / results_lib.REPORT)))
    print(mode)  # noqa: T201
    for name, value in rows:
        print(f"  {name:10}  {value}")  # noqa: T201


def _shown(path: Path) -> str:
    """Returns a path as short as it can be written from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _complain(text: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()] or ["unknown error"]
    print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), file=sys.stderr)  # noqa: T201


def _text(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package '{error.name}' is missing or broken: {error}\n"
            "'pip install .' in vidjax's folder brings what it needs"
        )
    return str(error)


def _exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        return None if (error.name or "").startswith("vidjax") else 2
    if isinstance(error, (ValueError, OSError)):
        return 2  # without the imports below, which take a second

    from vidjax.run.checkpoint import CheckpointError
    from vidjax.run.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code
    return 3 if isinstance(error, CheckpointError) else None


def _show_warning(message: Any, *args: Any, **kwargs: Any) -> None:
    del args, kwargs  # where in the code it arose is no use to a reader
    _complain(f"warning: {message}")


def run() -> NoReturn:
    """Runs this process as the command `vidjax`: signals, messages on stderr, the exit code."""
    signal.signal(signal.SIGINT, _stop_at_once)
    signal.signal(signal.SIGTERM, _stop_at_once)
    warnings.simplefilter("ignore")  # what libraries say to programmers
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    exit_code = main()
    gc.freeze()  # what lives to the end is not looked through once more: over a second, otherwise
    sys.exit(exit_code)


if __name__ == "__main__":
    run()
