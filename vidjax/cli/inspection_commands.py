"""`vidjax check` and `config`: test what vidjax can read, and list the fields of configurations."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.config import DEFAULTS, Config
from vidjax.runs.config_io import override_names, value_text
from vidjax.runs.run_folder import CONFIG
from vidjax.training import public
from vidjax.utils import exit_codes, files, messages
from vidjax.utils.errors import UserError, VidjaxWarning, warn
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser

DEFAULT, COMMAND_LINE = "default", "command line"  # origins of the value of a field


def add_check_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax check`."""
    about = "the folder of the run or the gallery to check"
    parser.add_argument("--workdir", metavar="FOLDER", help=about)
    about = "a folder of nets that vidjax convert made: prints what each net is, and its speed"
    parser.add_argument("--models", metavar="DIR", help=about)
    shared_flags.add_config(parser)
    parser.fields(example="seed=1")
    parser.command(
        check, "--workdir=runs/mma", "--config=mma:iqiyi_vid --config.data.dir=PATH",
        "--models=models",
    )  # fmt: skip


def check(args: argparse.Namespace) -> Result:
    """Checks the installation, and the run, gallery or configuration that a flag names.

    Prints the result of a check when the check ends. The exit code is 0 if no check fails, 3 if a
    checkpoint is damaged, and 2 for other faults. The verdict counts the warnings of the checks.
    """
    findings, code = [], 0
    for subject, run_check in list_checks(args).items():
        state = "ok"
        with warnings.catch_warnings(record=True, action="always") as caught:
            try:
                text = run_check()
            except Exception as error:  # a library can raise any exception for a damaged file
                state, error_code = "FAULT", exit_codes.get_exit_code(error)
                text = exit_codes.describe_error(error)
                code = max(code, error_code or 2)
        for doubt in (str(x.message) for x in caught if x.category is VidjaxWarning):
            findings.append({"state": "warning", "subject": subject, "text": doubt})
            warn(doubt)
        text = "; ".join(line.strip() for line in text.splitlines() if line.strip())
        findings.append({"state": state, "subject": subject, "text": text})
        if not args.json and (state != "ok" or not args.quiet):
            messages.print_text(f"  {state:5}  {subject}: {text}")
    states = [finding["state"] for finding in findings]
    faults = [finding["subject"] for finding in findings if finding["state"] == "FAULT"]
    verdict = "all good"
    if faults:
        verdict = f"FAULT: {', '.join(faults)}"
    elif doubts := states.count("warning"):
        verdict = f"no faults, {messages.count(doubts, 'warning')}"
    return Result({"findings": findings, "verdict": verdict}, text=verdict, code=code)


def list_checks(args: argparse.Namespace) -> Mapping[str, Callable[[], str]]:
    """Returns the checks that the flags ask for, subject -> function. A subject is, e.g., `data`.

    The function returns a summary of the subject. If the subject has a fault, it raises an error.
    """
    given = [flag for flag in ("workdir", "config", "models") if getattr(args, flag)]
    if len(given) > 1:
        raise UserError(
            f"--{given[0]} and --{given[1]} cannot be checked together: leave one of them out"
        )
    if args.overrides and given in ([], ["models"]):
        raise UserError(
            f"{args.overrides[0]} has no effect without a configuration\n"
            "add --workdir=FOLDER or --config=FILE"
        )
    # If a run is training now, little memory of the accelerator is free, so none is reserved.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.apps.gallery import store
    from vidjax.apps.video import net_checks
    from vidjax.runs import checkpoint

    if args.models:
        return net_checks.list_checks(Path(args.models).expanduser())
    checks: dict[str, Callable[[], str]] = {"environment": _check_environment}
    if args.config:
        config = config_io.override(public.load_config(args.config), args.overrides)
        return checks | {"data": partial(_check_data, config)}
    if not args.workdir:
        return checks
    workdir = Path(args.workdir).expanduser().absolute()
    if files.exists(workdir / store.GALLERY_FILE):
        if args.overrides:
            raise UserError(f"{args.overrides[0]} has no effect on a gallery: leave it out")
        return checks | {"gallery": partial(_check_gallery, workdir)}
    config = config_io.override(public.open_run(workdir).config, args.overrides)
    if config.join.runs:
        raise UserError(
            f"'{workdir}' is a blend of other runs, so it has no checkpoint\n"
            f"check each of these runs: {', '.join(config.join.runs)}"
        )
    for step in checkpoint.list_folders(workdir):
        folder = workdir / "checkpoints" / str(step)
        checks[f"checkpoint {step}"] = partial(_check_checkpoint, folder)
    return checks | {"run": partial(_check_run, config, workdir)}


def _check_checkpoint(folder: Path) -> str:
    from vidjax.runs import checkpoint

    count = len(checkpoint.verify(folder)["files"])
    return f"{messages.count(count, 'file')} with the right sha256"


def _check_environment() -> str:
    from vidjax.core import devices
    from vidjax.runs.versions import collect_versions

    devices.make_mesh()  # if an accelerator cannot be used, the error gives the reason
    return ", ".join(f"{name} {version}" for name, version in collect_versions().items())


def _check_data(config: Config) -> str:
    from vidjax.training import plan
    from vidjax.training.dry_run import dry_run

    config_lib.check(config)
    dry_run(config)
    data = public.load_data(config)
    plan.make_plan(config, data)
    return _count_clips(data.report["splits"])


def _check_run(config: Config, workdir: Path) -> str:
    from vidjax.evaluation import trained_runs
    from vidjax.runs import checkpoint, digests
    from vidjax.runs.run_folder import RunFolder

    with warnings.catch_warnings(action="ignore"):  # other checks report damaged checkpoints
        run = trained_runs.find_run(config, RunFolder(workdir))
    for prefer in ("latest", "best"):
        checkpoint.warn_of_lost(workdir, prefer)
    data, manifest = public.load_data(config), run.manifest
    digests.check_data(workdir, manifest["data"], config, data, trains=False)
    return f"step {manifest['step']:,} and its data: {_count_clips(data.report['splits'])}"


def _count_clips(splits: Mapping[str, Mapping[str, int]]) -> str:
    counts = {name: messages.count(split["clips"], "clip") for name, split in splits.items()}
    return ", ".join(f"{name} {clips}" for name, clips in counts.items())


def _check_gallery(folder: Path) -> str:
    from vidjax.apps.gallery.gallery import Gallery

    gallery = Gallery(folder)
    clips = messages.count(sum(gallery.identities.values()), "clip")
    people = messages.count(len(gallery.identities), "person")
    return f"{people} with {clips}, {messages.count(len(gallery.strangers), 'stranger')}"


def add_config_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax config`."""
    shared_flags.add_config(parser)
    about = "instead of --config: the folder of a run"
    parser.add_argument("--workdir", metavar="FOLDER", help=about)
    parser.fields(example="seed=1")
    parser.command(show_config, "--config=mma --config.seed=1", "--workdir=runs/mma")


def show_config(args: argparse.Namespace) -> Result:
    """Lists the fields of a configuration file, of a run, or of the default configuration."""
    if args.workdir and args.config:
        raise UserError("--config and --workdir cannot be used together: leave out one of them")
    if args.config:
        config, file = public.load_config(args.config), args.config
    elif args.workdir:
        workdir = Path(args.workdir).expanduser()
        config, file = public.open_run(workdir).config, messages.relative_path(workdir / CONFIG)
    else:
        config, file = config_lib.default(), DEFAULT
    fields = describe_fields(config, args.overrides, file)
    table = [("field", "value", "default", "from")]
    for name, row in fields.items():
        default = value_text(row["default"]) if name in DEFAULTS else ""
        table.append((name, value_text(row["value"]), default, row["from"]))
    return Result({"fields": fields}, text="\n".join(messages.align_columns(table)))


def describe_fields(
    config: Config, overrides: Sequence[str], file: str
) -> dict[str, dict[str, Any]]:
    """Returns field -> {"value": ..., "default": ..., "from": the origin of the value}.

    The origin is `command line` if a word `--config.FIELD=VALUE` of `overrides` sets the field.
    Otherwise the origin is `default` for a default value, and the argument `file` for other values.

    Fields of models and fusions, such as `model.embed_dim`, come last and have the default None.
    """
    values = dict(config_lib.fields(config_io.override(config, overrides)))
    typed, rows = set(override_names(overrides)), {}
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        rows[name] = {"value": values[name], "default": DEFAULTS.get(name), "from": origin}
    return rows
