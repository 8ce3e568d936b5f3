"""One file per command of the command line: what it reads, what it writes, what it says."""
