"""The command line: flags to a mode, and errors short enough to read."""

import argparse
import difflib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _stop_at_once(*args: Any) -> None:
    del args
    # Not an exception: one that lands within an import or a callback of a library is lost there.
    os.write(2, b"vidjax: stopped\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports that take seconds; the loop has its own handler
    signal.signal(signal.SIGINT, _stop_at_once)

from vidjax import config as config_lib  # noqa: E402
from vidjax.config import Config  # noqa: E402

MODES = ("train", "evaluate")
FLAGS = ("--config", "--workdir", "--mode", "--runs", "--debug", "--help")

DESCRIPTION = """\
Identify people in video: train a system on frame features, rank the clips of every identity.

  python -m vidjax.main --config=configs/mma.py
  python -m vidjax.main --config=configs/mma.py:iqiyi_vid --config.data.dir=PATH
  python -m vidjax.main --mode=evaluate --workdir=runs/mma --config.eval.split=test
  python -m vidjax.main --mode=evaluate --workdir=runs/both --runs=runs/mma,runs/deepmef
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 success, 2 a mistake of the user or in the data, 3 no usable checkpoint, 130 and 143 stopped
    by SIGINT and SIGTERM.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _run(_parse(words))
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except Exception as error:
        code = _exit_code(error)
        if debug or code is None:
            traceback.print_exc()
        else:
            _complain(str(error))
        return code or 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # argparse would print the usage and leave the process
        raise ValueError(message)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m vidjax.main",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE[:ARG,...]", help="a file of configs/")
    parser.add_argument("--workdir", metavar="W", help="the run's folder (default runs/NAME)")
    parser.add_argument("--mode", default="train", choices=MODES, help="default: train")
    parser.add_argument("--runs", metavar="A,B", help="folders of runs to join, with evaluate")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        dest="ignored",
        help="overrides a field, e.g. --config.seed=1",
    )
    own, overrides = [], []
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
        if flag.startswith("--") and flag not in FLAGS:
            close = difflib.get_close_matches(flag, FLAGS, n=1)
            hint = f": did you mean {close[0]}?" if close else "; --help lists them"
            raise ValueError(f"no flag {flag}{hint}")
    args = parser.parse_args(own)
    if args.workdir == "":
        raise ValueError("--workdir= is empty: name a folder")
    args.overrides = overrides
    return args


def _run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.mode == "train":
        config, workdir_path = _train_config(args)
    else:
        config, workdir_path = _workdir_config(args)

    # Heavy imports wait until the words are known to make sense.
    from vidjax import evaluate, train
    from vidjax import join as join_lib
    from vidjax import mesh as mesh_lib
    from vidjax import workdir as workdir_lib
    from vidjax.data.records import default_cache_dir

    mesh_lib.keep_programs(Path(config.data.cache_dir or default_cache_dir()).expanduser())
    workdir = workdir_lib.make_workdir(workdir_path)
    with workdir_lib.lock(workdir):
        if args.mode == "train":
            results = train.finished(workdir, config)
            if results is None:
                results = train.train(config, workdir, _load(config))
        elif config.join.runs:
            results = join_lib.join(config, workdir, _load)
        else:
            results = evaluate.evaluate(config, workdir, _load(config))
    _summarise(args.mode, workdir, results, time.monotonic() - began)
    return 0


def _train_config(args: argparse.Namespace) -> tuple[Config, str]:
    if args.runs is not None:
        raise ValueError("--runs joins trained runs: it goes with --mode=evaluate")
    if not args.config:
        raise ValueError("--mode=train needs --config=FILE, e.g. --config=configs/mma.py")
    config = config_lib.override(config_lib.load_file(args.config), args.overrides)
    name, _, words = args.config.partition(":")
    default = "-".join([Path(name).stem, *(word for word in words.split(",") if word)])
    return config, args.workdir or f"runs/{default}"


def _workdir_config(args: argparse.Namespace) -> tuple[Config, str]:
    if not args.workdir:
        raise ValueError(f"--mode={args.mode} needs --workdir=FOLDER, that of a trained run")
    if args.config:
        raise ValueError(f"--mode={args.mode} takes its configuration from --workdir, not --config")
    workdir = Path(args.workdir).expanduser()
    runs = tuple(str(Path(r.strip()).expanduser().absolute()) for r in (args.runs or "").split(","))
    if args.runs is None:
        config = config_lib.load_workdir(workdir)
    else:
        config = config_lib.default()
        config.join.runs = runs
        if (workdir / "config.json").exists():
            there = config_lib.load_workdir(workdir).join.runs
            if tuple(there) != runs:
                what = "joins other runs" if there else "is a run of its own"
                raise ValueError(f"--workdir: '{args.workdir}' {what}: use another folder")
    return config_lib.override(config, args.overrides), args.workdir


def _load(config: Config) -> Any:
    from vidjax.data import pipeline

    return pipeline.load(
        config.data.name,
        directory=config.data.dir,
        cache_dir=config.data.cache_dir,
        size=config.data.size,
        seed=config.data.seed,
    )


def _summarise(mode: str, workdir: Path, results: dict[str, Any], seconds: float) -> None:
    lines = [f"{mode}: {workdir}"]
    if "map" in results:
        lines.append(
            f"  MAP@100 {results['map']:.4f} ({results['map_kind']}), top-1 {results['top1']:.4f}"
        )
    else:
        lines.append("  no ground truth for this split: ranked, not scored")
    lines.append(
        f"  {results['num_clips']} clips, {results['num_identities']} identities, {seconds:.1f} s"
    )
    print("\n".join(lines))  # noqa: T201


def _complain(text: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()] or ["unknown error"]
    print("\n".join(["vidjax: " + lines[0], *lines[1:3]]), file=sys.stderr)  # noqa: T201


def _exit_code(error: Exception) -> int | None:
    """Returns the exit code of an expected error, None for a fault of the program."""
    from vidjax.checkpoint import CheckpointError
    from vidjax.workdir import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, CheckpointError):
        return 3
    return 2 if isinstance(error, (ValueError, OSError)) else None


def _show_warning(message: Any, *args: Any, **kwargs: Any) -> None:
    del args, kwargs  # where in the code it arose is no use to a reader
    _complain(f"warning: {message}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what libraries say to programmers
    warnings.filterwarnings("default", category=UserWarning, module="vidjax")
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vidjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors arrive as exceptions
    sys.exit(main())
