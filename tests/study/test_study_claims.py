import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from holdfast.study import claim

HOLDER = """
import sys, time
from pathlib import Path
from holdfast.study import claim
with claim(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_a_claim_is_granted_once_and_again_when_it_is_over(tmp_path):
    path = tmp_path / "locks" / "one"
    with claim(path) as ours:
        assert ours
        with claim(path) as other:
            assert not other
        # Whoever was refused takes nothing away from the holder.
        with claim(path) as other:
            assert not other
        with claim(path.with_name("two")) as another:
            assert another
    assert not path.exists()
    with claim(path) as ours:
        assert ours


def test_a_claim_goes_with_a_process_that_is_killed(tmp_path):
    path = tmp_path / "one"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with claim(path) as ours:
        assert not ours
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=60)
    with claim(path, wait=True) as ours:
        assert ours


def test_a_claim_is_kept_by_work_that_fails_no_longer_than_it_runs(tmp_path):
    path = tmp_path / "one"
    with pytest.raises(RuntimeError), claim(path):
        raise RuntimeError
    with claim(path) as ours:
        assert ours


def test_a_lock_file_that_was_taken_away_in_between_is_no_claim(tmp_path, monkeypatch):
    path = tmp_path / "one"
    import fcntl

    real, taken = fcntl.flock, []

    def late(handle, flags):
        if not taken:
            # The former holder ends between our opening the file and locking it.
            taken.append(path.stat().st_ino)
            path.unlink()
            path.with_name("other").touch()
        return real(handle, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with claim(path) as ours:
        assert ours
        # The claim is on the file that others see.
        with claim(path) as other:
            assert not other


def test_where_locks_do_not_work_every_claim_is_granted(tmp_path, monkeypatch):
    import fcntl

    def unsupported(handle, flags):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claim(tmp_path / "one") as ours, claim(tmp_path / "one") as other:
        assert ours
        assert other


WORKER = """
import sys
from pathlib import Path
from holdfast.study import claim
folder, me = Path(sys.argv[1]), sys.argv[2]
done = 0
while done < 200:
    for index in range(200):
        if (folder / f"{index}.done").exists():
            continue
        with claim(folder / f"{index}.lock") as ours:
            if ours and not (folder / f"{index}.done").exists():
                with (folder / "told").open("a") as told:
                    told.write(f"{index}\\n")
                (folder / f"{index}.done").touch()
    done = len(list(folder.glob("*.done")))
"""


def test_racing_processes_do_every_piece_once(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(place)])
        for place in range(3)
    ]
    deadline = time.monotonic() + 120
    for worker in started:
        assert worker.wait(timeout=deadline - time.monotonic()) == 0
    told = (tmp_path / "told").read_text().split()
    assert sorted(map(int, told)) == list(range(200))
