"""The gallery: people who are enrolled, found and deleted without training; see `gallery`.

| file | holds |
|---|---|
| `gallery.py` | what a user calls from Python, `vidjax.Gallery` |
| `commands.py` | what a user types, `python -m vidjax.gallery` |
| `vectors.py` | clips to vectors, by a trained run |
| `backend.py` | the coordinates and settings in which vectors are compared |
| `index.py` | exact search over people, in these coordinates |
| `calibration.py` | thresholds from strangers |
| `store.py` | the file: whole or not at all, and nothing of what was removed |
| `answers.py` | answers as a table or a file |
| `qdrant.py` | export to a vector database |
"""
