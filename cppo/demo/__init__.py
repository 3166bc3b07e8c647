"""The demos: tiny models made here, real handwritten digits, a warm-up, CPPO, and a report.

Reading order: tiny (models), digits, arithmetic and shortcut (tasks), warmup (where RL starts),
run (`cppo demo`), report and svg (the page it writes).
"""
