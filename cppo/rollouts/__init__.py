"""Questions in, sampled completions out."""
