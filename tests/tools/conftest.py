import functools

import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.tools.sandbox import Limits, Sandbox

# numpy and sympy have tests of their own: every worker would take a second to import them.
LIGHT = ("math", "random", "itertools")
LIMITS = Limits(wall_seconds=2.0, cpu_seconds=0.5, memory_mib=128, output_bytes=1000)


@functools.cache
def no_bwrap() -> str:
    """Why bwrap tests cannot run here; empty where they can."""
    try:
        Sandbox(workers=1).close()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=["bwrap", "process"])
def isolation(request):
    if request.param == "bwrap" and no_bwrap():
        pytest.skip(no_bwrap())
    return request.param


@pytest.fixture(scope="module")
def pool(isolation):
    with Sandbox(workers=2, isolation=isolation, limits=LIMITS, preload=LIGHT) as pool:
        yield pool


@pytest.fixture(scope="module")
def single():
    if no_bwrap():
        pytest.skip(no_bwrap())
    with Sandbox(workers=1, limits=LIMITS, preload=LIGHT) as pool:
        yield pool


def the_next_run_is_unaffected(pool: Sandbox) -> None:
    for result in [f.result() for f in [pool.submit("print(6 * 7)") for _ in range(3)]]:
        assert (result.status, result.output) == ("ok", "42\n")


@pytest.fixture
def sandbox(pool):
    yield pool
    the_next_run_is_unaffected(pool)


@pytest.fixture
def jail(single):
    """One worker of the real isolation, so that the next run meets what the last one left."""
    yield single
    the_next_run_is_unaffected(single)
