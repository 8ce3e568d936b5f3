"""Interrupts a program at one of its calls of chosen functions."""

from typing import Any

import pytest


def count_down(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> list[int]:
    """Returns a counter `[n]`: the n-th call of the functions (owner, name) is interrupted.

    Each call lowers the counter by one. The call that reaches 0 raises KeyboardInterrupt.
    """
    left = [0]

    def count(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, count(getattr(owner, name)))
    return left
