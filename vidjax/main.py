"""The command line: flags to a mode, and errors short enough to read.

Every function imports what it needs: a mistake in the words is reported before the libraries, which
take seconds, are loaded.
"""

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vidjax import api, machine, messages, tables

if TYPE_CHECKING:
    from vidjax.command_line import Arguments
    from vidjax.config import Config
    from vidjax.data.clips import TrainingData
    from vidjax.run.parts import Shard


def run() -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    machine.keep_freed_memory()
    messages.run(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `messages.guarded`.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    if words[:1] == ["gallery"]:
        from vidjax.gallery import commands

        return commands.main(words[1:])
    if words[:1] == ["forget"]:
        from vidjax import forget

        return forget.main(words[1:])

    def command() -> int:
        from vidjax import command_line

        args = command_line.parse(words)
        with messages.quietly() if args.quiet else contextlib.nullcontext():
            return _together(args, words) if args.place else RUNNERS[args.mode](args)

    return messages.guarded(command, words)


def _together(args: "Arguments", words: Sequence[str]) -> int:
    """Runs a command in one of several processes; the first one speaks for all."""
    from vidjax.cluster import chatter, join, processes
    from vidjax.commands import common
    from vidjax.run.signals import Interrupted

    group: join.Group | None = None

    def tell_of_signal(signum: int) -> None:
        if group:
            group.tell_of_signal(signum)

    def run() -> int:
        if processes.is_first():
            return RUNNERS[args.mode](args)
        with messages.quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return RUNNERS[args.mode](args)

    def command() -> int:
        nonlocal group
        if "--debug" not in words:
            chatter.divert(join.LOST)
        assert args.place
        group = join.join(args.place, messages.complain)
        try:
            code = run()
        except Interrupted:  # in all processes, at the same step
            group.end()
            raise
        except Exception as error:
            group.fail(error, messages.text_of(error))
            raise
        group.end()
        return code

    # A mistake in the words is told before the others are waited for.
    (common.for_training if args.mode == "train" else common.for_evaluation)(args)
    _end_on_signals(tell_of_signal)
    code = messages.guarded(command, words)
    if code:  # jax would wait until the others end, too
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train(args: "Arguments") -> int:
    from vidjax.commands import common
    from vidjax.training import together

    began = time.monotonic()
    config, path = common.for_training(args)
    together.check_command(args, config)
    if not (path / "config.json").exists():  # before there is a folder, or data are read
        common.rehearse(args, config)
        _set_up_devices(config)
    with _locked_folder(path) as workdir:
        from vidjax.cluster import processes
        from vidjax.evaluation import run_data
        from vidjax.training import train

        results = processes.run_on_first(lambda: train.finished(workdir, config))
        finished_before = results is not None
        if results is None:
            _set_up_devices(config)
        data = api.load_data(config)
        together.check_data(data)
        if results is not None:
            run_data.check_finished(workdir, results, config, data)
        else:
            results = train.train(
                config, workdir, data, analyse=config.eval.report, command=args.command,
                began=began,
            )  # fmt: skip
        if finished_before and processes.is_first() and _lacks_report(config, workdir):
            from vidjax.analysis import outputs

            outputs.write_report(workdir)  # somebody deleted it
    seconds = None if finished_before else results["seconds"]
    _summarise(args, config, workdir, results, seconds, finished_before=finished_before)
    return 0


def _lacks_report(config: "Config", workdir: Path) -> bool:
    from vidjax.run import results

    return config.eval.report and not (workdir / results.REPORT).exists()


def _evaluate(args: "Arguments") -> int:
    from vidjax.commands import common
    from vidjax.config_io import override_names
    from vidjax.training import together

    if args.shard:
        return _evaluate_part(args, args.shard)
    began = time.monotonic()
    config, path = common.for_evaluation(args)
    together.check_command(args, config)
    if args.overrides and not config.join.runs:
        common.rehearse(args, config)
    with _locked_folder(path) as workdir:
        from vidjax.commands import blend, evaluate

        _set_up_devices(config)
        if config.join.runs:
            results = blend.blend_runs(config, workdir, api.load_data)
        else:
            evaluate.check_folder(config, workdir, override_names(args.overrides))
            data = api.load_data(config)
            together.check_data(data)
            results = evaluate.evaluate(config, workdir, data, analyse=config.eval.report)
    _summarise(args, config, workdir, results, time.monotonic() - began)
    return 0


def _evaluate_part(args: "Arguments", which: "Shard") -> int:
    from vidjax.commands import common
    from vidjax.config_io import override_names

    began = time.monotonic()
    config, path = common.for_evaluation(args)
    if args.overrides:
        common.rehearse(args, config)
    _end_on_signals()
    from vidjax.commands import common, evaluate, parts

    workdir = path.absolute()
    _set_up_devices(config)
    evaluate.check_folder(config, workdir, override_names(args.overrides))
    made = parts.evaluate_part(config, workdir, api.load_data(config), which)
    rows = common.part_rows(workdir, made.part, time.monotonic() - began)
    heading = args.mode + (": finished before, nothing was scored now" if made.before else "")
    text = "\n".join([heading, *(f"  {name:10}  {value}" for name, value in rows.items())])
    content = {"workdir": str(workdir), "part": str(made.part.path), "shard": str(which)}
    facts = {"num_clips": made.part.facts.num_clips, "finished_before": made.before}
    _tell(args, text, content | facts)
    return 0


def _merge(args: "Arguments") -> int:
    from vidjax.commands import common
    from vidjax.config_io import override_names

    began = time.monotonic()
    config, path = common.for_evaluation(args)
    if args.overrides:
        common.rehearse(args, config)
    with _locked_folder(path) as workdir:
        from vidjax.commands import evaluate, parts

        _set_up_devices(config)
        evaluate.check_folder(config, workdir, override_names(args.overrides))
        data = api.load_data(config)
        results = parts.merge(config, workdir, data, overrides=args.overrides)
    _summarise(args, config, workdir, results, time.monotonic() - began)
    return 0


def _report(args: "Arguments") -> int:
    from vidjax.commands import common

    workdir = common.for_report(args)
    from vidjax.report import run_page

    page = run_page.write(workdir)
    _tell(args, f"report: {page}", {"workdir": str(workdir), "report": str(page)})
    return 0


def _config(args: "Arguments") -> int:
    from vidjax.commands import common
    from vidjax.commands import config as config_command

    config, file = common.for_display(args)
    rows = list(config_command.rows(config, args.overrides, file))
    _tell(args, config_command.text(rows), {"fields": config_command.as_json(rows)})
    return 0


def _rank(args: "Arguments") -> int:
    from vidjax.commands import common

    options = common.for_ranking(args)
    tables.check_new(options.out)  # before what takes seconds
    from vidjax import predict
    from vidjax.data.memory import load_clips
    from vidjax.run import terminal

    run = predict.restore(options.workdir, step=options.step)
    clips = load_clips(
        options.input,
        run.modalities,
        run.identities,
        split=options.split,
        quality=run.config.data.quality,
    )
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label="rank", leave=False, compiles=True)
    tables.write_ranking(options.out, run.rank(clips, advance=progress.advance))
    progress.close()
    timed, numbers = terminal.timing(began, size)
    rows = {"clips": f"{size:,}", "identities": f"{len(run.identities):,}", **dict(timed)}
    rows["ranking"] = messages.shown(options.out)
    text = "\n".join(["rank", *(f"  {name:10}  {value}" for name, value in rows.items())])
    content = {"workdir": str(run.workdir), "ranking": str(options.out.absolute())}
    counts = {"num_clips": size, "num_identities": len(run.identities)}
    _tell(args, text, content | counts | numbers)
    return 0


def _compare(args: "Arguments") -> int:
    from vidjax.commands import common

    comparison = common.for_comparison(args)
    from vidjax.commands import compare
    from vidjax.run import workdir as workdir_lib

    def load(config: "Config") -> "TrainingData":
        config.data.cache_dir = comparison.cache_dir or config.data.cache_dir
        return api.load_data(config)

    with workdir_lib.locked(comparison.workdir) as workdir:
        table, numbers = compare.compare(
            comparison.runs,
            workdir,
            load,
            split=comparison.split,
            directory=comparison.directory,
        )
    page = f"{messages.shown(workdir)}/comparison.html"
    content = {"comparison": page, "table": table, **numbers}
    _tell(args, f"{table}\ncomparison: {page}, .md, .csv", content)
    return 0


def _check(args: "Arguments") -> int:
    from vidjax.commands import common

    checked = _checked_gallery(args)
    config, workdir = (None, checked) if checked else common.for_check(args)
    # An accelerator may be at work on the run that is checked.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.commands import findings

    subject = str(workdir or args.config or "the environment")
    lines = not (args.quiet or args.json)
    if lines:
        messages.say(f"check: {subject}")
    items = []
    if checked:
        from vidjax.commands.findings import check_gallery

        found = (*findings.check(None, None), *check_gallery(checked))
    else:
        found = findings.check(config, workdir)
    for item in found:  # print each line at once: reading data takes time
        items.append(item)
        if lines or (args.quiet and not args.json and item.state != findings.OK):
            messages.say(f"  {item.state:7}  {item.text}")
    content = {"check": subject, "findings": [item._asdict() for item in items]}
    _tell(args, findings.verdict(items), {**content, "verdict": findings.verdict(items)})
    return findings.exit_code(items)


def _checked_gallery(args: "Arguments") -> Path | None:
    """Returns the folder to check if it is that of a gallery."""
    if not args.workdir or args.config or args.runs is not None:
        return None
    from vidjax.commands.findings import is_gallery

    folder = Path(args.workdir).expanduser().absolute()
    return folder if is_gallery(folder) else None


RUNNERS = {
    "train": _train,
    "evaluate": _evaluate,
    "merge": _merge,
    "rank": _rank,
    "compare": _compare,
    "report": _report,
    "check": _check,
    "config": _config,
}


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """Makes a run's folder and holds its lock, for all processes of the run."""
    from vidjax.run import workdir as workdir_lib
    from vidjax.training import together

    _end_on_signals()
    with workdir_lib.locked(path) as workdir:
        together.check_folder(workdir)
        yield workdir


def _end_on_signals(tell: Callable[[int], None] = lambda signum: None) -> None:
    """Lets signals end the process of a command even while a program is compiled."""
    from vidjax.run import signals

    if signal.getsignal(signal.SIGTERM) is messages.stop_at_once:
        signals.end_on_signals(tell)


def _set_up_devices(config: "Config") -> None:
    from vidjax import devices, files

    if config.deterministic:
        devices.be_deterministic()
    devices.keep_programs(Path(config.data.cache_dir or files.default_cache_dir()).expanduser())
    devices.make_mesh()  # an absent device is told before data are read


def _summarise(
    args: "Arguments",
    config: "Config",
    workdir: Path,
    results: Mapping[str, Any],
    seconds: float | None,
    *,
    finished_before: bool = False,
) -> None:
    """Prints the scores of a run and the files to look at."""
    from vidjax.commands import common

    rows = common.rows(config, workdir, results, seconds)
    heading = args.mode
    if finished_before:
        heading += ": finished before, nothing was trained now"
    text = "\n".join([heading, *(f"  {name:10}  {value}" for name, value in rows.items())])
    content = {"workdir": str(workdir), **common.result_files(config, workdir)}
    content |= {"finished_before": finished_before, "metrics": dict(results)}
    _tell(args, text, content)


def _tell(args: "Arguments", text: str, content: Mapping[str, Any]) -> None:
    """Prints the result of a command: the text, or with `--json` the content as one line."""
    if args.place:
        from vidjax.cluster import processes

        if not processes.is_first():
            return
    if not args.json:
        messages.say(text)
        return
    from vidjax.commands import common

    messages.say(common.to_json({"mode": args.mode, **content}))


if __name__ == "__main__":
    run()
