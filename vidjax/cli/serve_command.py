"""`vidjax serve`: identifies people over HTTP with a gallery, and optionally serves a run."""

import argparse
import os
import warnings
from pathlib import Path

from vidjax.utils import messages
from vidjax.utils.errors import UserError, VidjaxWarning, require_packages
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax serve`."""
    about = "the folder of the gallery"
    parser.add_argument("--gallery", metavar="G", required=True, help=about)
    about = "the folder of a run, whose net is served, too"
    parser.add_argument("--run", metavar="W", help=about)
    about = "the address of the server (default: %(default)s)"
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help=about)
    about = "the port, or 0 for any free port (default: %(default)s)"
    port = messages.whole_number(0, 65535)
    parser.add_argument("--port", metavar="N", type=port, default=8080, help=about)
    about = "a file with a secret that clients must send; needed if ADDRESS is not local"
    parser.add_argument("--token-file", metavar="F", help=about)
    parser.command(serve, "--gallery=people", "--gallery=people --run=runs/mma --port=9000")


def serve(args: argparse.Namespace) -> Result:
    """Serves requests until a signal arrives. Prints the address of the server first."""
    require_packages(
        "serve", "starlette", "uvicorn", "httptools", "prometheus_client", extra="serve"
    )
    from vidjax.apps.serve import limits as limits_lib

    token = limits_lib.read_token(Path(args.token_file).expanduser()) if args.token_file else None
    if token is None and not limits_lib.is_loopback(args.host):
        raise UserError(
            f"--host={args.host} can be reached from other machines, so clients need a token: add "
            "--token-file=F\nto make a token: (umask 077; openssl rand -hex 32 > F)"
        )
    from vidjax.apps.gallery.gallery import Gallery, make_run_origin
    from vidjax.apps.serve import app as app_lib

    restored = None
    if args.run:
        from vidjax.evaluation import predict

        restored = predict.restore(args.run)
    gallery = Gallery(args.gallery, run=restored)  # a gallery of models ignores the run
    if restored and make_run_origin(restored).digest != gallery.origin.digest:
        gallery = Gallery(args.gallery)  # it finds the run that it was made with
    gallery.remove_leftovers()
    limits = limits_lib.Limits()
    app = app_lib.make_app(gallery, restored, limits, token)
    listener = app_lib.listen(args.host, args.port)
    with listener:
        address, number = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        messages.print_text(f"http://{host}:{number}")
        # Messages for the terminal contain names of people. The log of a server must not.
        os.environ[messages.QUIET] = "1"
        warnings.simplefilter("ignore", VidjaxWarning)
        complete = app_lib.serve(app, listener, limits)
    text = "ended" if complete else "ended; unfinished requests were cut off"
    return Result({"ended": True, "complete": complete}, text=text)
