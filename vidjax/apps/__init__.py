"""Applications of trained models: galleries of known people, films, a server, tables of clips.

No application trains a model. The module `forget` finds and deletes what vidjax has stored about a
person.
"""
