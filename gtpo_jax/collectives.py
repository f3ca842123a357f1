"""What a compiled program moves between devices, read from its HLO text."""

import itertools
import math
import re
from collections import Counter
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def sent(hlo: str) -> dict[str, float]:
    """Bytes of all results of collective operations, by kind, on one device; what stands in a
    loop counts as often as the loop is known to go round."""
    own: dict[str, Any] = {}  # Counters of bytes
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = here = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            here = found[1]
            own[here], calls[here] = Counter(), []
            entry = here if line.startswith("ENTRY") else entry
        elif here:
            if found := _OPERATION.search(line):
                arrays = _ARRAY.findall(found[1])
                # A start gives (operands, results): only the second half arrives.
                arrays = arrays[len(arrays) // 2 :] if found[3] else arrays
                own[here][found[2]] += sum(_bytes(*array) for array in arrays)
            times = int(found[1]) if (found := _TIMES.search(line)) else 1
            branches = [re.split(r"[,\s%]+", names) for names in _BRANCHES.findall(line)]
            for name in itertools.chain(_CALLED.findall(line), *branches):
                calls[here].append((name, times))

    def total(name: str) -> Counter:
        out = Counter(own.get(name, ()))
        for called, times in calls.get(name, ()):
            if called in own:
                out.update({kind: times * n for kind, n in total(called).items()})
        return out

    return dict(total(entry))


def _bytes(kind: str, shape: str) -> float:
    return BITS.get(kind, 0) / 8 * math.prod(int(n) for n in shape.split(",") if n)
