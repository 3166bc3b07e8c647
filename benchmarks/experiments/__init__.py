"""Scripts that measure one thing each, by their name, and print or write a table of it.

    step.py              what pruning saves of a whole training step, and what others take
    shared_prompts.py    what it saves to run a question's prompt once
    trl_update.py        how much of TRL's own update phase pruning saves
    trl_packed.py        how much of it padding and repeated prompts cost
    demo_runs.py         the demo over seeds and settings
    host_time.py         what a call of the losses costs where computing costs nothing
    logits_dtype.py      what rounding the logits costs in log-probabilities, and saves in time
    reliability.py       what checkpoints with checksums and the journal of a step cost
    triton_registers.py  registers and spills of every Triton kernel, compiled without a GPU

Rows go to ./cppo-bench, with --record over the committed ones in benchmarks/results.
"""
