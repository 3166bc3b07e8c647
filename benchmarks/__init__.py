"""Benchmarks: one list of cases, one harness, every peer that is installed.

The folder installs as `cppo.benchmarks`; `cppo bench` and `pytest benchmarks/` run the same cases.

    cases.py, inputs.py        what is measured: one list of cases, and their inputs
    peers.py, eager.py         who is measured beside cppo
    calls.py, accuracy.py      one call, and whether its result is right
    harness.py                 one case: right first, then its memory and its times
    timing.py                  clocks, peak memory, the limits of the machine
    run.py, gpu.py             `cppo bench`; `make gpu`
    report.py, charts.py       rows, tables and numbers of the texts; PNG charts, one HTML page
    experiments/               scripts that measure one thing each
"""
