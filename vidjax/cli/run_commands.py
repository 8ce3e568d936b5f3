"""`vidjax train`, `evaluate`, `report` and `config`: train runs, and show their results and fields.

Some libraries take seconds to load. Each function first checks its flags, so that a mistake is
reported at once, and imports these libraries later.
"""

import argparse
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib, config_io, signals
from vidjax.runs.config import DEFAULTS, Config
from vidjax.runs.run_folder import CONFIG, RunFolder, make_and_lock
from vidjax.training import public
from vidjax.utils import exit_codes, files, messages
from vidjax.utils.errors import UserError, warn
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser

DEFAULT, COMMAND_LINE = "default", "command line"  # origins of the value of a field


def add_train_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax train`."""
    shared_flags.add_config(parser, required=True)
    parser.flag("--workdir FOLDER", "the run's folder (default: runs/NAME)")
    parser.fields(example="seed=1")
    shared_flags.add_processes(parser)
    examples = ("--config=configs/mma.py", "--config=mma:iqiyi_vid --config.data.dir=PATH")
    parser.command(train, *examples)


def read_train_settings(args: argparse.Namespace) -> tuple[Config, Path]:
    """Returns the configuration of the run to train, and its folder."""
    config = config_io.override(public.load_config(args.config), args.overrides)
    name = public.name_run(args.config, config, args.overrides)
    workdir = args.workdir or Path("runs", name)
    if config.data.dir and workdir.absolute() == files.local(config.data.dir).absolute():
        raise UserError(
            f"--workdir={workdir} is the folder of the data, config.data.dir\n"
            "name another folder for the run"
        )
    config_lib.check(config)
    return config, workdir


def train(args: argparse.Namespace) -> Result:
    """Trains or resumes a run. If the run is already finished, prints its results again."""
    began = time.monotonic()
    config, path = read_train_settings(args)
    with lock_folder(path) as workdir:
        results, was_finished = public.train_run(
            config, RunFolder(workdir), command=args.line, began=began
        )
    seconds = None if was_finished else results["seconds"]
    return summarise(config, RunFolder(workdir), results, seconds)


def add_evaluate_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax evaluate`."""
    shared_flags.add_workdir(parser)
    shared_flags.add_definitions(parser)
    parser.fields(example="eval.split=test")
    about = "folders of runs to blend; --workdir is then a new folder for the results"
    parser.flag("--runs A,B", about)
    shared_flags.add_processes(parser)
    parser.command(
        evaluate,
        "--workdir=runs/mma --config.eval.split=test",
        "--workdir=runs/both --runs=runs/mma,runs/deepmef",
    )


def add_report_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax report`."""
    shared_flags.add_workdir(parser)
    parser.command(write_report, "--workdir=runs/mma")


def read_evaluate_settings(args: argparse.Namespace) -> tuple[Config, RunFolder]:
    """Returns the configuration and the folder of the run that the flags name.

    With `--runs`, the mean scores of several runs are evaluated. The folder is then `--workdir`.
    """
    config_io.refuse_training_fields(args.overrides)
    model = shared_flags.load_definitions(args)
    if args.coordinator and args.runs is not None:
        raise UserError(
            "--coordinator has no effect with --runs: a single process evaluates a blend of runs\n"
            "leave out --coordinator, --num_processes and --process_id"
        )
    folder = RunFolder(args.workdir) if args.runs else public.open_run(args.workdir)
    runs = [name.strip() for name in (args.runs or "").split(",") if name.strip()]
    config = public.configure_blend(runs, folder) if args.runs else folder.config
    config = public.configure_evaluation(config, args.overrides)
    trained = config.model.get("name")
    if model not in (None, trained) and not config_lib.is_blend(config):
        warn(
            f"--config={args.config}: the run keeps its model '{trained}', and "
            f"'{model}' is not used\n"
            f"leave out --config, or choose a run of the model '{model}': --workdir=FOLDER"
        )
    return config, folder


def evaluate(args: argparse.Namespace) -> Result:
    """Ranks the clips of a split with a run, or with the mean scores of several runs."""
    began = time.monotonic()
    config, folder = read_evaluate_settings(args)
    from vidjax.training.dry_run import dry_run

    if (args.overrides or args.config) and not config_lib.is_blend(config):
        dry_run(config)
    with lock_folder(folder.path):
        results = public.evaluate_run(config, folder, command=args.line)[config.eval.split]
    return summarise(config, folder, results, time.monotonic() - began)


def write_report(args: argparse.Namespace) -> Result:
    """Writes `report.html` again, from the files of a run."""
    folder = public.open_run(args.workdir)
    from vidjax.evaluation.report import run_page

    return Result({"workdir": str(folder.path), "report": str(run_page.write(folder))})


def lock_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Makes the folder of a run; returns a context manager that locks the folder."""
    if signal.getsignal(signal.SIGTERM) is exit_codes.stop_at_once:
        signals.end_on_signals()  # then Ctrl-C also stops a long compilation
    return make_and_lock(path)


def summarise(
    config: Config, folder: RunFolder, results: Mapping[str, Any], seconds: float | None
) -> Result:
    """Returns what a command prints: the scores of a run, and the paths of its files.

    `results` is the content of `metrics.json`. `seconds` is the time that the command took, or None
    if an earlier command finished the run.
    """
    paths = folder.paths(config.eval.split, apart=bool(results.get("overrides")))
    facts = {"workdir": folder.path, "ranking": paths.ranking}
    if paths.report.exists():
        facts["report"] = paths.report
    texts: dict[str, str] = {name: messages.relative_path(path) for name, path in facts.items()}
    texts |= folder.describe(config, results)
    if took := results.get("seconds") if seconds is None else seconds:
        texts["trained in" if seconds is None else "time"] = f"{took:.1f} s"
    more: dict[str, Any] = {"finished_before": seconds is None, "metrics": dict(results)}
    if others := folder.split_metrics(config):
        more["splits"] = others
    note = ": was finished before, and was not trained again" if seconds is None else ""
    return Result({**facts, **more}, texts, note=note)


def add_config_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax config`."""
    source = parser.add_mutually_exclusive_group()
    shared_flags.add_config(parser, of=source)
    parser.flag("--workdir FOLDER", "instead of --config: the folder of a run", of=source)
    parser.fields(example="seed=1")
    parser.command(show_config, "--config=mma --config.seed=1", "--workdir=runs/mma")


def show_config(args: argparse.Namespace) -> Result:
    """Lists the fields of a configuration file, of a run, or of the default configuration.

    If a training with these values would be refused, the exit code is 2.
    """
    if args.config:
        config, file = public.load_config(args.config), args.config
    elif args.workdir:
        config = public.open_run(args.workdir).config
        file = messages.relative_path(args.workdir / CONFIG)
    else:
        config, file = config_lib.default(), DEFAULT
    config = config_io.override(config, args.overrides)
    fields = describe_fields(config, args.overrides, file)
    problems = [] if config.join.runs else [*config_lib.problems(config)]  # no blend is trained
    for problem in problems:
        messages.print_problem(problem)
    rows = [("field", "value", "default", "from")]
    for name, row in fields.items():
        default = config_io.value_text(row["default"]) if name in DEFAULTS else ""
        rows.append((name, config_io.value_text(row["value"]), default, row["from"]))
    return Result({"fields": fields, "problems": problems}, rows=rows, code=2 if problems else 0)


def describe_fields(
    config: Config, overrides: Sequence[str], file: str
) -> dict[str, dict[str, Any]]:
    """Returns field -> {"value": ..., "default": ..., "from": where the value is from}.

    "from" is "command line" if a word `--config.FIELD=VALUE` of `overrides` sets the field.
    Otherwise, it is "default" for a default value, and the value of `file` for other values. Fields
    of models and fusions, such as `model.embed_dim`, come last. Their default is None.
    """
    values = dict(config_lib.fields(config))
    typed, rows = set(config_io.override_names(overrides)), {}
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        rows[name] = {"value": values[name], "default": DEFAULTS.get(name), "from": origin}
    return rows
