"""The reports of a run: files of its folder in, `report.html` out, and one page per other split.

The page needs no other file, no network and no script. It shows what training and evaluation have
written; no data is read, and no model is run.
"""

from pathlib import Path

from vidjax import files
from vidjax.report import (
    analysis_sections,
    html,
    mistakes,
    model_sections,
    open_set_sections,
    run_sections,
    settings,
)
from vidjax.report.html import Html
from vidjax.report.run_files import RunFiles, fitting, load, of_split
from vidjax.run import results

# (identifier, heading, function that yields the section as parts of HTML, none to leave it out)
SECTIONS = (
    ("summary", "Summary", run_sections.summary),
    ("names", "Clips and names", mistakes.names),
    ("reading", "How to read it", settings.reading),
    ("learning", "Learning curves", run_sections.learning_curves),
    ("identities", "Identities", analysis_sections.identities),
    ("mistakes", "Mistakes and lists", mistakes.mistakes),
    ("strata", "Kinds of clips", analysis_sections.strata),
    ("open_set", "Distractors and calibration", open_set_sections.open_set),
    ("attention", "Attention between modalities", model_sections.attention),
    ("frames", "Frames", model_sections.frames),
    ("robustness", "Robustness", analysis_sections.robustness),
    ("ensemble", "Ensemble", run_sections.ensemble),
    ("data", "Data", run_sections.data),
    ("configuration", "Configuration", settings.configuration),
)


def write(workdir: Path) -> Path:
    """Writes the report of the run in a folder, and those of other splits that it has analysed.

    A page is written whole or not at all.

    Returns:
      The path of the report on the split that training evaluates.

    Raises:
      ValueError: there is no run, or one of its files is damaged.
    """
    run = load(workdir)
    for split in run.analysed:
        page = fitting(render, of_split(run, split))
        files.write_text(results.paths(workdir, split, run.split).report, page)
    path = workdir / results.REPORT
    files.write_text(path, fitting(render, run))
    return path


def render(run: RunFiles) -> Html:
    """Returns the page as HTML."""
    return html.page(
        settings.title(run),
        [(key, title, make(run)) for key, title, make in SECTIONS],
        lead=settings.lead(run),
        nav=True,
        footer="vidjax made this page from the files of the run. It contains names of clips and "
        "identities, and no features.",
    )
