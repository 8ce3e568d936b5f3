"""Recognises identities that a spreadsheet or another program has probably changed.

A spreadsheet turns the number 123456789012 into 1.23E+11, and pandas turns a missing value into the
text nan. Then two people have one name, or clips of nobody have the name of a person. But a person
may really have such a name. So the identities are not changed, and a warning appears.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from vidjax.utils.errors import warn
from vidjax.utils.names import show

Names = Collection[str]  # the identities of a table

_MONTH = "(jan|feb|mar|mär|mrz|apr|may|mai|jun|jul|aug|sept?|oct|okt|nov|dec|dez)"
# What an identity looks like -> a pattern, which ignores upper and lower case.
_FORMS = {
    # Upper and lower case matter, because Nan, Na and Nat are names of people.
    "a word for a missing value": (
        r"(?-i:-?nan|-?NaN|NAN|null|NULL|Null|\(null\)|[Nn]one|NONE|nil|NIL|undefined|n/a|N/A|n\.a\."
        r"|na|NA|<NA>|<na>|#N/A|#NA|#NV|#N/D|NaT|\\N|--?|\.|\?|-?1\.#(QNAN|IND)|-nan\(ind\))"
    ),
    "a number in scientific notation": r"[+-]?\d([.,]\d+)?e[+-]?\d{1,3}",
    "a date or a time": (
        r"\d{4}-\d\d-\d\d([ t]\d\d:\d\d(:\d\d(\.\d+)?)?)?|\d{1,2}:\d\d:\d\d( ?[ap]m)?"
        r"|\d{1,2}/\d{1,2}/(\d\d|\d{4})|\d{1,2}\.\d{1,2}\.\d{4}"
        rf"|\d{{1,2}}\.?[- ]{_MONTH}([- ]\d\d|[- ]\d{{4}})?|{_MONTH}-\d\d"
    ),
    "a truth value": "true|false",
    "an error of a spreadsheet": r"#¡?\w+(/0)?[!?]|##+|err:\d+",
    "a number with separators of thousands": r"[+-]?\d{1,3}([,'\u2019\xa0\u202f]\d{3})+([.,]\d+)?",
    "a number after an apostrophe": r"['\u2019]\d+",
    "text of a Python object": (
        r"b'.*'|b\".*\"|(np|numpy)\.\w+\(.*\)|(tensor|array)\(.*\)|[\[({]['\"].*['\"],?[\])}]"
    ),
}
_DIGITS = 15  # a spreadsheet replaces further digits of a number by zeros


def warn_of_changed(places: Mapping[str, str]) -> None:
    """Warns, in one line, of identities that a program has probably changed.

    `places` is identity -> the place of its first clip, such as a file and a line.
    """
    found = [(like, names) for like, find in _TESTS.items() if (names := find(places))]
    if not found:
        return
    texts = []
    for like, names in found:
        count = f" ({len(names):,} identities)" if len(names) > 1 else ""
        texts.append(f"'{show(names[0])}' looks like {like}{count}")
    warn(
        f"{places[found[0][1][0]]}: identity {', '.join(texts)}: if a program has changed "
        "identities, write them as text, and leave missing identities empty"
    )


def _find_form(pattern: str) -> Callable[[Names], list[str]]:
    form = re.compile(pattern, re.IGNORECASE)

    def find(names: Names) -> list[str]:
        matches = [name for name in names if form.fullmatch(name)]
        if not matches:
            return []
        # Next to 1a5, also 1e5 is a code. Next to Ada-01, Jan is a person in Jan-01.
        codes = {_simplify(name) for name in names if not form.fullmatch(name)}
        return [n for n in matches if not re.search(r"\d", n) or _simplify(n) not in codes]

    return find


def _simplify(name: str) -> str:
    """Replaces numbers by 0 and words by a. A word with digits is replaced by its length."""
    if name.isalnum() and re.search(r"\d", name) and re.search(r"[^\W\d]", name):
        return str(len(name))
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name))


def _find_decimals(names: Names) -> list[str]:
    """Finds decimals such as 100.0, which were probably written as 100.

    A decimal is found if the table also has 100, or if all decimals in the table are like 100.0.
    """
    parts = {n: re.split("[.,]", n) for n in names if re.fullmatch("-?[0-9]+[.,][0-9]+", n)}
    whole = [name for name, (_, decimals) in parts.items() if not decimals.strip("0")]
    return [n for n in whole if len(whole) == len(parts) or parts[n][0] in names]


def _find_rounded(names: Iterable[str]) -> list[str]:
    """Finds long numbers, if all of them end in zeros from the 16th digit on."""
    long = [name for name in names if re.fullmatch(rf"[1-9][0-9]{{{_DIGITS},}}", name)]
    zeros = sum(len(name) - _DIGITS for name in long)
    # A single zero may be chance.
    return long if zeros > 1 and not any(name[_DIGITS:].strip("0") for name in long) else []


def _find_lost_zeros(names: Names) -> list[str]:
    """Finds numbers such as 007, if the table also has 7."""
    return [n for n in names if re.fullmatch("0+[0-9]+", n) and (n.lstrip("0") or "0") in names]


def _find_blanks(names: Names) -> list[str]:
    """Finds names with unusual blanks, such as a no-break space, next to a name with others."""
    usual = {name: " ".join(name.split()) for name in names}
    counts = Counter(usual.values())
    return [name for name in names if usual[name] != name and counts[usual[name]] > 1]


# What an identity looks like -> the function that finds such identities.
_TESTS: Mapping[str, Callable[[Names], list[str]]] = {
    **{like: _find_form(pattern) for like, pattern in _FORMS.items()},
    "a whole number with decimals": _find_decimals,
    "a number that was rounded to 15 digits": _find_rounded,
    "a number that lost zeros in other lines": _find_lost_zeros,
    "a name with other blanks in other lines": _find_blanks,
}
