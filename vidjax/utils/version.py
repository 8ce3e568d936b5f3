"""Contains the version of vidjax."""

VERSION = "0.1.0"
