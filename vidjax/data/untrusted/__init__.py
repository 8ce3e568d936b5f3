"""Reads pickles from strangers in a limited child process.

This folder needs only numpy and the standard library.
"""
