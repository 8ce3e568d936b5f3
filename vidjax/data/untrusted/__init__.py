"""Reads pickles from strangers, in a child process with limits.

This folder needs only numpy and the standard library.
"""
