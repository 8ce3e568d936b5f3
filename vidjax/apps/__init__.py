"""Applications: galleries, names for films, a server, exports, tables of clips, deletion."""
