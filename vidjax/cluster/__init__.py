"""Several processes that work on one run, over `jax.distributed`; one process is the usual case.

`processes` says which process this is, and lets all of them agree. `join` starts and ends them
together and notices who is gone, `chatter` keeps what C++ libraries print off the terminal.
`share` reads the flags, and says what a process reads.
"""
