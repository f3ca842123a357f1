"""Thousands of runs, one in five hostile, leave nothing behind; `benchmarks.soak` is longer."""

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
def test_nothing_is_left_of_many_runs(isolation):
    report = soak(10_000, isolation, seconds=30)
    assert report["runs"] >= 300
    assert report["grown"] == [], report
    assert report["next_run_clean"]
    assert report["statuses"].get("infra", 0) == 0
