"""Applications: galleries of people, names for films, a server, exports, and tables of clips.

`forget` deletes people and clips from everything that vidjax has stored.
"""
