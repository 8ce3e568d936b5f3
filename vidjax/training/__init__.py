"""Trains models. `plan` prepares a run, `loop` repeats training steps, and `feed` reads the clips.

`public` contains the public functions of `import vidjax`.
"""
