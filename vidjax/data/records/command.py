"""The commands that convert a folder without training: their arguments and their report."""

import argparse
from collections.abc import Callable
from pathlib import Path

from vidjax import messages
from vidjax.data.frame_fields import RecordSource
from vidjax.data.records.convert import convert
from vidjax.data.records.engines import Beam, Pool
from vidjax.data.records.report import format_report, label_records


def make_parser(module: str, description: str) -> messages.Parser:
    """Returns the parser of `python -m MODULE DIR`."""
    parser = messages.Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--cache_dir", metavar="C", type=Path, help="$VIDJAX_CACHE or ~/.cache/vidjax by default"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, help="processes; one per core by default"
    )
    parser.add_argument(
        "--beam_options",
        metavar="O",
        help="write by Apache Beam, such as runner=FnApiRunner,direct_num_workers=0,"
        "direct_running_mode=multi_processing",
    )
    return parser


def convert_folder(args: argparse.Namespace, open_source: Callable[[], RecordSource]) -> int:
    """Converts a folder, prints its report and returns the exit code.

    Args:
      args: what a parser of `make_parser` has parsed.
      open_source: returns the frames of the folder.
    """
    engine = Pool(args.workers) if args.beam_options is None else Beam(args.beam_options)
    source = open_source()
    records = convert(source, args.cache_dir, engine=engine)
    _, _, report = label_records(records, source.truth(records.clips))
    messages.say(f"{format_report(report)}\n{records.folder / 'data_report.json'}")
    return 0
