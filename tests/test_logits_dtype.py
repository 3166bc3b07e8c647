"""benchmarks/experiments/logits_dtype.py: what rounding the logits of a head costs."""

from __future__ import annotations

from cppo.benchmarks.experiments import logits_dtype


def test_exact_logits_leave_ratios_at_one_and_rounded_ones_do_not():
    exact, rounded = logits_dtype.measure(*logits_dtype.drawn(), repeats=1)
    assert (exact["logits_dtype"], rounded["logits_dtype"]) == ("fp32", "input")
    assert exact["tokens"] == rounded["tokens"] == 60
    assert float(exact["logp_error_max"]) < 1e-5 and exact["ratios_off_by_1_percent"] == 0
    assert float(rounded["logp_error_mean"]) > 1e-3 and rounded["ratios_off_by_1_percent"] > 0.1
    assert all(row["both_s"] > 0 and row["peak_mb"] > 0 for row in (exact, rounded))
