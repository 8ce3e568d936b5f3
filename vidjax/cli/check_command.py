"""`vidjax check`: tests the installation, or a run, a gallery, a configuration or some nets."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vidjax.cli import shared_flags
from vidjax.runs import installation
from vidjax.utils import exit_codes, files, messages
from vidjax.utils.errors import UserError, VidjaxWarning, warn
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser

RUN_FILE = "config.json"  # as in `runs.run_folder`, which needs the packages of runs


def add_check_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax check`."""
    subject = parser.add_mutually_exclusive_group()
    parser.flag("--workdir FOLDER", "the folder of the run or the gallery to check", of=subject)
    about = "a folder of nets that vidjax convert made: prints what each net is, and its speed"
    parser.flag("--models DIR", about, of=subject)
    shared_flags.add_config(parser, of=subject)
    parser.fields(example="seed=1")
    parser.command(
        check, "--workdir=runs/mma", "--config=mma:iqiyi_vid --config.data.dir=PATH",
        "--models=models",
    )  # fmt: skip


def check(args: argparse.Namespace) -> Result:
    """Checks the installation, and the run, gallery or configuration that a flag names.

    Prints the result of each check as soon as the check ends. The exit code is 0 if no check fails,
    3 if a checkpoint is damaged, and 2 for other faults. If optional packages are not installed,
    this is no fault. The text of the returned result is a verdict, such as "all good".
    """
    findings, code = [], 0
    for subject, run_check in list_checks(args).items():
        state = "ok"
        with warnings.catch_warnings(record=True, action="always") as caught:
            try:
                text = run_check()
            except installation.AbsentError as absent:
                state, text = "none", str(absent)
            except Exception as error:  # a library can raise any exception for a damaged file
                state, error_code = "FAULT", exit_codes.get_exit_code(error)
                text = exit_codes.describe_error(error)
                code = max(code, error_code or 2)
        for doubt in (str(x.message) for x in caught if x.category is VidjaxWarning):
            findings.append({"state": "warning", "subject": subject, "text": doubt})
            warn(doubt)
        text = "; ".join(line.strip() for line in text.splitlines() if line.strip())
        findings.append({"state": state, "subject": subject, "text": text})
        if not args.json and (state == "FAULT" or not args.quiet):
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
    """Returns the checks that the flags ask for: subject -> function.

    A subject is a word such as `data`. Its function returns a summary of the subject, or raises an
    error if the subject has a fault.
    """
    if args.overrides and not (args.workdir or args.config):
        raise UserError(
            f"{args.overrides[0]} has no effect without a configuration\n"
            "add --workdir=FOLDER or --config=FILE"
        )
    # If a run is training now, little memory of the accelerator is free, so none is reserved.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.models:
        from vidjax.apps.video import net_checks

        return net_checks.list_checks(args.models)
    checks = installation.list_checks()
    environment = {"environment": checks["environment"]}
    if args.workdir:
        return environment | _list_folder_checks(args.workdir.absolute(), args.overrides)
    if args.config:
        from vidjax.runs import config_io
        from vidjax.training import public, run_checks

        config = config_io.override(public.load_config(args.config), args.overrides)
        data = partial(run_checks.check_data, config)
        return environment | {"runs": checks["runs"], "data": data}
    return checks


def _list_folder_checks(workdir: Path, overrides: Sequence[str]) -> dict[str, Callable[[], str]]:
    """Returns subject -> check, for the gallery or training run in the folder `workdir`.

    `overrides` are the words `--config.FIELD=VALUE` of the command line.
    """
    from vidjax.apps.gallery import store

    if files.exists(workdir / store.GALLERY_FILE):
        if overrides:
            raise UserError(f"{overrides[0]} has no effect on a gallery: leave it out")
        return {"gallery": partial(_check_gallery, workdir)}
    if not files.exists(workdir / RUN_FILE) and not [*workdir.glob(f"*/{RUN_FILE}")]:
        # The packages that read runs may not be installed.
        raise UserError(
            f"'{workdir}' contains no gallery ({store.GALLERY_FILE}) and no run ({RUN_FILE})\n"
            "name the folder of a gallery or run; `vidjax who --out=DIR` makes DIR/gallery"
        )
    from vidjax.training import run_checks

    runs = installation.list_checks()["runs"]
    return {"runs": runs, **run_checks.list_checks(workdir, overrides)}


def _check_gallery(folder: Path) -> str:
    from vidjax.apps.gallery.gallery import Gallery

    gallery = Gallery(folder)
    clips = messages.count(sum(gallery.identities.values()), "clip")
    people = messages.count(len(gallery.identities), "person")
    return f"{people} with {clips}, {messages.count(len(gallery.strangers), 'stranger')}"
