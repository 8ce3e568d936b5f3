"""The commands of the command line: what each reads, what it writes, what it says."""
