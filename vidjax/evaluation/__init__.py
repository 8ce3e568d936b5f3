"""Evaluation, from trained weights to results: scores, rankings, comparisons and reports."""
