"""`vidjax export`, `import` and `serve`: use runs and galleries in other programs."""

import argparse
import logging
import os
import resource
import time
import warnings
from pathlib import Path

from vidjax.apps.server_limits import LIMITS, PREFIX, read_limits
from vidjax.cli import shared_flags
from vidjax.evaluation.export import formats
from vidjax.evaluation.export.formats import FORMATS
from vidjax.utils import files, messages, terminal
from vidjax.utils.errors import UserError, VidjaxWarning, require_packages
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser, whole_number

MANIFEST = "export.json"


def _read_paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the folder that a command reads, and the new folder that it writes.

    Raises UserError if the first folder is missing, or if the second exists.
    """
    source, to = args.folder.absolute(), args.to.absolute()
    if not source.is_dir():
        raise UserError(f"'{args.folder}' is not a folder: give the path of a folder")
    if files.exists(to):
        raise UserError(f"--to={to} already exists: name a new folder")
    return source, to


def add_export_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax export`."""
    parser.add_argument("folder", metavar="RUN", help="the folder of a run")
    parser.flag("--to DIR", "the new folder", required=True)
    parser.add_argument("--format", choices=FORMATS, required=True, help="the format")
    about = "the checkpoint of the run: the latest (default), or the one with the best MAP"
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest", help=about)
    shared_flags.add_definitions(parser)
    parser.command(_export, "runs/mma --to=exported --format=onnx")


def add_import_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax import`."""
    parser.add_argument("folder", metavar="DIR", help="a folder that vidjax export has written")
    parser.flag("--to NEW_RUN", "the folder of the new run", required=True)
    shared_flags.add_definitions(parser)
    parser.command(_import, "exported --to=runs/copy")


def _export(args: argparse.Namespace) -> Result:
    """Exports a run, and checks that the exported files give the same results."""
    (source, to), began = _read_paths(args), time.monotonic()
    from vidjax.training import public

    shared_flags.load_definitions(args)
    target = FORMATS[args.format]
    require_packages(f"--format={args.format}", *target.packages, extra=target.extra)
    with files.atomic_folder(to) as folder:
        public.open_run(source)  # if it is no run, the error gives a remedy
        facts = formats.write_run(args.format, source, folder, args.checkpoint)
        written = {"format": args.format, **facts, "files": files.sha256_folder(folder)}
        files.write_manifest(folder / MANIFEST, written)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    texts = {
        "folder": messages.relative_path(to),
        "contains": target.file,
        "compared": f"largest difference {facts['difference']:.1e}; 1e-05 is allowed",
        "bytes": f"{size / 1e6:,.1f} MB",
        "time": f"{time.monotonic() - began:.1f} s",
    }
    return Result({"folder": str(to), **written, "bytes": size}, texts)


def _import(args: argparse.Namespace) -> Result:
    """Makes the folder of a run from the files of `vidjax export`, in any export format."""
    from vidjax.evaluation import predict
    from vidjax.evaluation.export import weights

    source, to = _read_paths(args)
    shared_flags.load_definitions(args)
    weights.read(source, to)
    run = predict.restore_run(to)
    texts = {"identities": len(run.identities), "modalities": ", ".join(run.modalities)}
    return Result({"workdir": str(to), "step": run.step}, texts)


def add_serve_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax serve`."""
    parser.flag("--gallery G", "the folder of the gallery", required=True)
    parser.flag("--run W", "the folder of the gallery's run, if the run was moved")
    about = "the address of the server (default: %(default)s)"
    parser.flag("--host ADDRESS", about, default="127.0.0.1")
    about = "the port, or 0 for any free port (default: %(default)s)"
    parser.flag("--port N", about, type=whole_number(0, 65535), default=8080)
    about = "a file with a secret that clients must send; needed if ADDRESS is not local"
    parser.flag("--token-file F", about)
    about = "logs a line of JSON for each request to standard error, without names"
    parser.flag("--access-log", about)
    about = f"An environment variable also sets a limit, such as {PREFIX}CLIPS for --clips.\n"
    about += "In brackets: the HTTP status of a request above the limit."
    group = parser.add_argument_group("limits", about)
    for limit in LIMITS.values():
        about = f"{limit.meta.description} (default: {limit.text})"
        parser.flag(f"{limit.flag} N", about, of=group)
    parser.command(serve, "--gallery=people", "--gallery=people --port=9000")


def serve(args: argparse.Namespace) -> Result:
    """Answers HTTP requests until a signal arrives. First prints the address of the server."""
    require_packages(
        "serve", "starlette", "uvicorn", "httptools", "prometheus_client", extra="serve"
    )
    from vidjax.apps import web
    from vidjax.apps.serve import limits as limits_lib

    limits = read_limits({name: getattr(args, name) for name in LIMITS}, os.environ)
    limits_lib.ACCESS.setLevel(logging.INFO if args.access_log else logging.WARNING)
    token = limits_lib.read_token(args.token_file) if args.token_file else None
    if token is None and not web.is_loopback(args.host):
        raise UserError(
            f"--host={args.host} can be reached from other machines, so clients need a token: add "
            "--token-file=F\nto make a token: (umask 077; openssl rand -hex 32 > F)"
        )
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.gallery.store import Store
    from vidjax.apps.serve import app as app_lib

    gallery = Gallery(args.gallery, run=args.run)
    Store(gallery.folder).remove_leftovers()
    app = app_lib.make_app(gallery, limits, token)
    listener = web.listen(args.host, args.port, limits)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each connection is an open file
    with listener:
        address, number = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        messages.print_text(f"http://{host}:{number}")
        # Messages for the terminal contain names of people. The log of a server must not.
        os.environ[terminal.QUIET] = "1"
        warnings.simplefilter("ignore", VidjaxWarning)
        complete = web.serve(app, listener, limits, app.leaving)
    text = "ended" if complete else "ended; unfinished requests were cut off"
    return Result({"ended": True, "complete": complete}, text=text)
