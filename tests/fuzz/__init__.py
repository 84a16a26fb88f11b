"""Fuzzing of everything that reads files of strangers: `targets` says what, `__main__` runs it for long.

An input is a *tree*: files by name, and in them what their format is made of, as lists, dicts, numbers and texts.
`packing` makes bytes of a tree, with the lengths, counts and offsets that it needs; `mutation` changes trees, and the
bytes that they become.  So most inputs get past the checks that random bytes would not pass.
"""
