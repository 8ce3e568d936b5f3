"""Trains models. `loop` repeats training steps, and `feed` reads the clips.

`dry_run` checks a configuration before the data are read, and `plan` prepares a run. `public`
contains the public functions of `import vidjax`.
"""
