"""Runs inside the sandbox, standard library alone: a program against its tests.

Two processes. The tests run in the first, `grade`; the program in a second one, `serve`, that
was started afresh, so that nothing of the tests is in its memory. What goes between them is
plain data, spelled in JSON: a call's arguments one way, its value the other. An object of the
program's own stays there, and the tests hold a `Remote` for it.
"""

import builtins
import json
import os
import subprocess
import sys

CONTAINERS = {"t": tuple, "s": set, "z": frozenset}


def pack(value, keep):
    """JSON for a value; what is no plain data goes through `keep`, which gives it a number.

    A subclass goes as what it is a kind of, with what the base class says of its contents: a
    method that the program overrode is never asked.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind.__add__(value, kind()) if type(value) is not kind else value
    if isinstance(value, list):
        return [pack(v, keep) for v in list.__iter__(value)]
    for tag, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {tag: [pack(v, keep) for v in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[pack(k, keep), pack(v, keep)] for k, v in dict.items(value)]}
    if type(value) is bytes:
        return {"b": value.hex()}
    if type(value) is complex:
        return {"c": [value.real, value.imag]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"y": value.__name__}
    return {"o": keep(value)}


def unpack(value, find):
    """The value that `pack` made JSON of; `find` gives the object of a number."""
    if isinstance(value, list):
        return [unpack(v, find) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag in CONTAINERS:
        return CONTAINERS[tag](unpack(v, find) for v in content)
    if tag == "d":
        return {unpack(k, find): unpack(v, find) for k, v in content}
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "c":
        return complex(*content)
    if tag == "y":
        kind = getattr(builtins, content)
        return kind if isinstance(kind, type) else None
    return find(content)


# --- the process of the program ---


def serve():
    """Execute the program, then do what the tests ask for, until they end."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.set_int_max_str_digits(0)
    space = {"__name__": "solution"}
    objects = []

    def keep(value):
        objects.append(value)
        return len(objects) - 1

    def do(request):
        if "programs" in request:
            sys.path[:] = request["path"]
            for program in request["programs"]:
                exec(compile(program, "<solution>", "exec", dont_inherit=True), space)
            return None
        target = space[request["name"]] if "name" in request else objects[request["object"]]
        if request["do"] == "get":
            return getattr(target, request["key"])
        if request["do"] == "set":
            return setattr(
                target, request["key"], unpack(request["value"], objects.__getitem__)
            )
        if request["do"] == "iterate":
            return list(target)
        args, kwargs = unpack(request["args"], objects.__getitem__)
        return target(*args, **kwargs)

    while line := requests.readline():
        try:
            reply = {"value": pack(do(json.loads(line)), keep)}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


# --- the process of the tests ---


class Remote:
    """Something in the program's process. It equals nothing but itself, whatever it says."""

    def __init__(self, ask, **where):
        self.__dict__.update(_ask=ask, _where=where)

    def __call__(self, *args, **kwargs):
        return self._ask(do="call", args=pack([list(args), kwargs], number_of), **self._where)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(do="get", key=name, **self._where)

    def __setattr__(self, name, value):
        self._ask(do="set", key=name, value=pack(value, number_of), **self._where)

    def __iter__(self):
        return iter(self._ask(do="iterate", **self._where))


def number_of(value):
    if not isinstance(value, Remote) or "object" not in value._where:
        raise TypeError(f"the tests pass a {type(value).__name__}, which is no plain data")
    return value._where["object"]


def grade(case):
    """Run case["tests"] with each of case["names"] standing for the program's; then, outside
    of all that the program could reach, say the word that only the host knows."""
    child = subprocess.Popen(
        [sys.executable, *case["flags"], "-c", case["source"] + "\nserve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    sys.set_int_max_str_digits(0)

    def ask(**request):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            raise RuntimeError("the program ended its process")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(str(reply["error"]))
        return unpack(reply["value"], lambda number: Remote(ask, object=number))

    ask(path=sys.path, programs=case["programs"])
    space = {"__name__": "tests"}
    exec(case["before"], space)
    for name in case["names"]:
        space[name] = Remote(ask, name=name)
    exec(case["tests"], space)
    child.kill()
    print(case["nonce"])
