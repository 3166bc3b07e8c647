"""Benchmarks: one list of cases, one harness, every peer that is installed.

The folder installs as `cppo.benchmarks`; `cppo bench` and `pytest benchmarks/` run the same cases.

    cases -> inputs -> peers (eager, torch.compile, TRL, Liger, verl, ...) -> harness -> rows
    -> table in the terminal, CSV, PNG, one HTML page
"""
