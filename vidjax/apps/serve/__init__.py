"""Answers to other programs over HTTP: the Open Inference Protocol, and people by name in JSON.

`app` makes the ASGI application of a gallery and perhaps a run, and runs it until a signal.
`models` turns tensors into answers, `protocol` bytes into tensors and back. `batcher` scores
requests that arrive together, together. `limits` bounds what a stranger may send, knows who may
ask, and counts. The command is `vidjax/cli/serve_command.py`.
"""
