"""Recipes for other engines: files and folders that they read, each held against the recipe before it is left there.

`ENGINES.md` says what each format can say and who reads it.
"""
