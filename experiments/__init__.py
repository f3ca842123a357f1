"""Controlled comparisons: which arms (`studies`), running them (`run`), what came out
(`report`)."""
