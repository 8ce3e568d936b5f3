"""Parametrisations in which the first cases belong to the quick tests, and others have a mark."""

import pytest

CASE = type(pytest.param())


def quick_first(cases, count=1, mark=pytest.mark.slow):
    """Returns the cases for `parametrize`, with a mark on all cases after the first `count`.

    A case is the value of an argument, or a tuple of the values of several arguments.
    """
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    rows = [row if isinstance(row, CASE) else pytest.param(*row) for row in values]
    later = [pytest.param(*row.values, id=row.id, marks=(*row.marks, mark)) for row in rows[count:]]
    return rows[:count] + later


def nightly_after_first(names, cases, count=1):
    """Parametrises a test. Cases after the first `count` have the mark `nightly`."""
    return pytest.mark.parametrize(names, quick_first(cases, count, pytest.mark.nightly))
