"""The demos: tiny models made here, real handwritten digits, a warm-up, CPPO, and a report.

Reading order: tiny (models), digits, arithmetic and shortcut (questions), tasks (the table of all
four), warmup (where RL starts), run (options and trainer), examples (what the report shows).
"""
