"""What the pages of docs/ hold, for the tests that compare them with the code."""

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def rows(name):
    """The rows of a page's tables, as lists of cells; headings and rules are left out."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables]
    return [row for row in cells if row[0].startswith("`")]


def metric_keys(phase):
    """The keys that docs/metrics.md says a line of this phase has."""
    keys = set()
    for key, phases, *_ in rows("metrics.md"):
        key = key.strip("`")
        if phases == "train, eval" and phase == "eval":
            key = f"eval/{key.replace('/', '_')}"
        if phases == "all" or phase in phases.split(", "):
            keys.add(key)
    return keys
