"""Describes to users how far the card of a net can be believed, see `models.card_check`."""

import shlex

from vidjax.models.card_check import Comparison

NOBODY = "nobody gets a name: vectors of two people are as alike as vectors of one person"
TWO_NAMES = "if two names are one person, or a photo shows another person, correct them"
SAME = 0.1  # people who differ less than this share of what the card says look like one person


def describe_problem(comparison: Comparison, models: str) -> str:
    """Returns how the enrolled people contradict the card, with a remedy, or "".

    `models` is the folder of the net.
    """
    between, within = f"{comparison.between:.2g}", f"{comparison.within:.2g}"
    texts = {
        "closer": f"the enrolled people differ only {between} times as much as the card of the "
        "net expects: similar people, such as relatives, may get a wrong name",
        "varied": f"the photos of one person differ {within} times as much as the card of the net "
        "expects: many names are missing or wrong",
        "farther": f"the enrolled people differ {between} times as much as the card of the net "
        "expects: many names are missing or wrong",
    }
    if comparison.problem == "blind":
        return (
            f"{NOBODY}\n{TWO_NAMES}\n"
            "if not, convert the net again: the order of colours or the scale may be wrong"
        )
    if comparison.problem == "closer" and comparison.between < SAME:
        return f"the enrolled people are as alike as photos of one person\n{TWO_NAMES}"
    if comparison.problem:
        return f"{texts[comparison.problem]}\n{advise_to_measure(models)}"
    return ""


def describe_default(models: str) -> str:
    """Returns a note about a card with the default numbers of a family of nets."""
    return (
        "the card of the net is not measured on your photos, so fewer people get a name\n"
        f"{advise_to_measure(models)}"
    )


def advise_to_measure(models: str) -> str:
    """Returns the command that measures a card."""
    words = ["vidjax", "measure-card", models, "--photos=FOLDER"]
    return f"to measure the card on photos of your people: {shlex.join(words)}"
