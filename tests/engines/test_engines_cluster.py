"""Ray itself, where it is installed: what becomes of work that fails, and who hears."""

import json
import subprocess
import sys

import pytest

from holdfast.engines.reading.cluster import Crew, cluster
from holdfast.errors import EnvironmentProblem

pytest.importorskip("ray")

SPREAD = """
import json, os, signal, sys, time
import psutil
from holdfast.engines.reading.cluster import Crew, cluster, spread
from holdfast.errors import EnvironmentProblem

class Worker:
    def __init__(self, told):
        self.told = told

    def __call__(self, batch):
        [item] = batch["item"]
        with open(self.told, "a") as log:
            log.write(f"{item}\\n")
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 13:
            raise ZeroDivisionError("thirteen")
        return {"said": [f"{item} by {self.told}"]}

crew, said, error = Crew(2), [], None
with cluster(crew) as (ray, share):
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for each in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in each.net_connections()
        if connection.status == "LISTEN"
    }
    try:
        items = json.loads(sys.argv[1])
        for each in spread(Worker, {"told": sys.argv[2]}, items, ray, share, crew):
            said.append(each)
    except EnvironmentProblem as found:
        error = str(found)
    usage = os.environ["RAY_USAGE_STATS_ENABLED"]
print(json.dumps({"said": said, "error": error, "listening": sorted(listening),
                  "usage": usage, "threads": share.threads}))
"""


def spread(tmp_path, items):
    told = tmp_path / "told"
    done = subprocess.run(
        [sys.executable, "-c", SPREAD, json.dumps(items), str(told)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found, list(map(int, told.read_text().split()))


def test_every_item_is_said_once_and_only_this_machine_hears_of_it(tmp_path):
    found, asked = spread(tmp_path, [0, 1, 2, 3, 4, 6, 7])
    assert sorted(int(each.split()[0]) for each in found["said"]) == sorted(asked)
    assert sorted(asked) == [0, 1, 2, 3, 4, 6, 7]
    assert found["error"] is None
    assert found["listening"] == ["127.0.0.1"]
    assert found["usage"] == "0"


def test_an_item_that_kills_its_worker_is_tried_four_times_and_then_named(tmp_path):
    found, asked = spread(tmp_path, [1, 5, 2])
    assert asked.count(5) == 4
    assert "expected workers that do their work" in found["error"]
    assert "fewer --workers" in found["error"]


def test_an_exception_ends_the_run_and_drops_nothing_in_silence(tmp_path):
    found, _ = spread(tmp_path, [1, 13, 2])
    assert "ZeroDivisionError: thirteen" in found["error"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there_is_named_at_once(address):
    with pytest.raises(EnvironmentProblem, match=f"expected Ray at {address}"):
        with cluster(Crew(2, address)):
            pass
