"""`vidjax check`: versions, devices, and whether data, a run or a gallery can be read."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.config import Config
from vidjax.training import api
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    about = "the folder of a run or of a gallery"
    parser.add_argument("--workdir", metavar="FOLDER", help=about)
    shared_flags.config_flag(parser)
    parser.fields()
    parser.command(run, "--workdir=runs/mma", "--config=mma:iqiyi_vid --config.data.dir=PATH")


def run(args: argparse.Namespace) -> Result:
    """Prints each finding at once, since reading data takes time, and then the verdict.

    The exit code is that of the worst finding: 3 for a damaged checkpoint, 2 for other faults.
    """
    findings, code = [], 0
    for subject, check in checks_of(args).items():
        state = "ok"
        try:
            text = check()
        except Exception as error:  # damaged files raise whatever their readers raise
            state, found = "FAULT", messages.exit_code(error)
            text = messages.text_of(error) if found else f"{type(error).__name__}: {error}"
            code = max(code, found or 2)
        text = "; ".join(line.strip() for line in text.splitlines() if line.strip())
        findings.append({"state": state, "subject": subject, "text": text})
        if not args.json and (state != "ok" or not args.quiet):
            messages.say(f"  {state:5}  {subject}: {text}")
    faults = [one["subject"] for one in findings if one["state"] != "ok"]
    verdict = f"FAULT: {', '.join(faults)}" if faults else "all good"
    return Result({"findings": findings, "verdict": verdict}, text=verdict, code=code)


def checks_of(args: argparse.Namespace) -> Mapping[str, Callable[[], str]]:
    """Returns subject -> a check of it, which returns what is good and raises what is not."""
    if args.workdir and args.config:
        raise UserError("check takes --workdir=FOLDER, or --config=FILE for its data: not both")
    if args.overrides and not (args.workdir or args.config):
        raise UserError("check with fields needs --workdir=FOLDER or --config=FILE")
    # The run may still be training: its accelerator has no memory to spare.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.apps.gallery import store
    from vidjax.runs import checkpoint

    checks: dict[str, Callable[[], str]] = {"environment": _environment}
    if args.config:
        config = config_io.override(api.load_config(args.config), args.overrides)
        return checks | {"data": partial(_data, config)}
    if not args.workdir:
        return checks
    workdir = Path(args.workdir).expanduser().absolute()
    if files.exists(workdir / store.NAME):
        return checks | {"gallery": partial(_gallery, workdir)}
    config = config_io.override(api.open_run(workdir).config, args.overrides)
    if config.join.runs:
        raise UserError(f"'{workdir}' joins runs: check {' and '.join(config.join.runs)}")
    for step in checkpoint.folders(workdir):
        checks[f"checkpoint {step}"] = partial(_checkpoint, workdir / "checkpoints" / str(step))
    return checks | {"run": partial(_run, config, workdir)}


def _checkpoint(folder: Path) -> str:
    from vidjax.runs import checkpoint

    return f"{len(checkpoint.verify(folder)['files'])} files, every sha256 agrees"


def _environment() -> str:
    from vidjax.core import devices

    devices.make_mesh()  # says why an accelerator cannot be used
    return ", ".join(f"{name} {version}" for name, version in devices.versions().items())


def _data(config: Config) -> str:
    from vidjax.training import plan

    config_lib.check(config)
    plan.dry_run(config)
    data = api.load_data(config)
    plan.make_plan(config, data)
    return _counts(data.report["splits"])


def _run(config: Config, workdir: Path) -> str:
    from vidjax.evaluation import restore
    from vidjax.runs.run_folder import RunFolder

    with warnings.catch_warnings(action="ignore"):  # about damaged checkpoints
        found = restore.find_run(config, RunFolder(workdir))
    data = api.load_data(config)
    restore.check_data(workdir, found.manifest["data"], config, data, trains=False)
    return f"step {found.manifest['step']:,} and its data: {_counts(data.report['splits'])}"


def _counts(splits: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{name} {split['clips']:,} clips" for name, split in splits.items())


def _gallery(folder: Path) -> str:
    from vidjax.apps.gallery.gallery import Gallery

    gallery = Gallery(folder)
    clips, strangers = sum(gallery.identities.values()), len(gallery.strangers)
    return f"{len(gallery.identities):,} people by {clips:,} clips, {strangers:,} strangers"
