"""Reads pickles from strangers in a limited child process, and checks names in their files.

This folder needs only numpy and the standard library.
"""
