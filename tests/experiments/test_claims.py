"""Runners that share a folder: each run is one's at a time, and none is lost."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import claims

ROOT = Path(__file__).parents[2]
DEAD = 2**22 + 1  # above any process number


def test_a_folder_appears_once_with_its_files(tmp_path):
    folder = tmp_path / "a" / "seed0"
    claims.create(folder, {"manifest.json": "one"})
    claims.create(folder, {"manifest.json": "two"})
    assert sorted(p.name for p in folder.iterdir()) == ["claim.free", "manifest.json"]
    assert (folder / "manifest.json").read_text() == "one"
    assert [p.name for p in folder.parent.iterdir()] == ["seed0"]


def test_from_hand_to_hand(tmp_path):
    folder = tmp_path / "seed0"
    claims.create(folder, {})
    claim = claims.take(folder)
    me = f"claim.{socket.gethostname()}.{os.getpid()}"
    assert claim.name == f"{me}.{os.getpid()}" and claims.take(folder) is None
    claim = claims.hand(claim, DEAD)  # a worker that ended: its runner still looks after it
    assert claims.take(folder) is None and not claims.done(folder)
    claims.release(claim)
    claim = claims.take(folder)
    claims.finish(claim)
    assert claims.done(folder) and claims.take(folder) is None


def test_what_the_dead_left_is_taken_and_what_an_orphan_does_is_not(tmp_path):
    host = socket.gethostname()
    for worker, taken in ((DEAD, True), (os.getpid(), False)):
        folder = tmp_path / str(worker)
        claims.create(folder, {})
        (folder / "claim.free").rename(folder / f"claim.{host}.{DEAD}.{worker}")
        assert bool(claims.take(folder)) == taken


def test_another_hosts_claim_is_stale_when_nothing_is_written(tmp_path):
    folder = tmp_path / "seed0"
    claims.create(folder, {"metrics.jsonl": ""})
    theirs = folder / "claim.some.other.host.1.1"
    (folder / "claim.free").rename(theirs)
    old = time.time() - claims.STALE - 60
    os.utime(theirs, (old, old))
    assert claims.take(folder) is None  # its metrics are new
    os.utime(folder / "metrics.jsonl", (old, old))
    assert claims.take(folder) is not None


def test_of_many_threads_one_gets_it(tmp_path):
    for i in range(20):
        folder = tmp_path / str(i)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda f: claims.create(f, {"x": ""}), [folder] * 8))
            got = list(pool.map(claims.take, [folder] * 8))
        assert sum(claim is not None for claim in got) == 1


def test_two_processes_share_the_work_and_do_nothing_twice(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from experiments import claims\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "for i in range(40):\n"
        "    claims.create(root / str(i), {})\n"
        "for i in range(40):\n"
        "    if claim := claims.take(root / str(i)):\n"
        "        with (root / 'done').open('a') as file:\n"
        "            file.write(f'{i}\\n')\n"
        "        time.sleep(0.005)\n"
        "        claims.finish(claim)\n"
    )
    (tmp_path / "done").touch()
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
        for _ in range(3)
    ]
    assert [p.wait() for p in processes] == [0, 0, 0]
    done = (tmp_path / "done").read_text().split()
    assert sorted(map(int, done)) == list(range(40))
