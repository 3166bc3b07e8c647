"""The public functions, one file per op: docstring, checks, dispatch through `cppo.backends`."""
