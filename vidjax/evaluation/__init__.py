"""Evaluates trained weights: computes scores, rankings, comparisons and reports."""
