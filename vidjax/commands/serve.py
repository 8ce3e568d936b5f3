"""`vidjax serve`: a gallery, and perhaps the net of a run, answers other programs over HTTP."""

import argparse
from pathlib import Path

from vidjax import messages
from vidjax.errors import UserError, need
from vidjax.messages import Command, Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    parser.flag("--gallery", "G", "the folder of the gallery", needed=True)
    parser.flag("--run", "W", "the folder of a run whose net is served, too")
    parser.flag("--host", "ADDRESS", "where to listen (default: 127.0.0.1)")
    parser.flag("--port", "N", "the port, 0 for any (default: 8080)")
    parser.flag("--token-file", "F", "who asks must know its token; needed for another --host")


def run(args: argparse.Namespace) -> Result:
    """Serves until a signal; the address is the first line of the output."""
    host = args.host or "127.0.0.1"
    port = _port(args.port)
    need("serve", "starlette", "uvicorn", "httptools", extra="serve")
    from vidjax.serve import limits as limits_lib
    from vidjax.serve import server

    token = limits_lib.read_token(Path(args.token_file)) if args.token_file else None
    if token is None and not limits_lib.is_loopback(host):
        raise UserError(
            f"--host={host} is reached from other machines: --token-file=F is needed\n"
            "make one: (umask 077; openssl rand -hex 32 > F)"
        )
    from vidjax import predict
    from vidjax.gallery.gallery import Gallery
    from vidjax.serve.app import make_app

    restored = predict.restore(args.run) if args.run else None
    gallery = Gallery(args.gallery, sync=True)
    if restored is not None and not gallery.origin.cards:
        gallery = Gallery(args.gallery, run=restored, sync=True)
    limits = limits_lib.Limits()
    app = make_app(gallery, restored, limits, token)
    listener = server.listen(host, port)
    with listener:
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        messages.say(f"http://{shown}:{number}")
        complete = server.serve(app, listener, limits)
    text = "ended" if complete else "ended: requests under way were cut off"
    return Result({"ended": True, "complete": complete}, text=text)


def _port(text: str | None) -> int:
    if text is None:
        return 8080
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise UserError(f"--port={text}: wanted a number from 0 to 65535")
    return int(text)


COMMAND = Command(
    "answers other programs over HTTP: who clips show",
    add_flags,
    run,
    ("--gallery=people", "--gallery=people --run=runs/mma --port=9000"),
)
