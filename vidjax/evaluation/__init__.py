"""Evaluates trained models: computes scores, rankings, comparisons, reports and exports.

Functions raise UserError, which is a ValueError, if a file or an argument of the user is wrong.
Docstrings write a dict as key -> value.
"""
