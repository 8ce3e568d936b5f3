"""From videos and photos to features of clips, without a run, JAX or TensorFlow.

`pipeline` extracts many files, each by a child process with limits; `film` is what that does:
`decode`, `shots`, `tracks`, `align`, and the nets of `models`, which `cards` describe and
`convert` makes. `folder` is what is written.
"""
