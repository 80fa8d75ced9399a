"""A short form of the campaign of kills and faults, and that it notices what it is there for."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import kill_and_resume
from mlxquant.files import atomic
{change}
sys.argv[0] = "kill_and_resume.py"
kill_and_resume.main()
"""


def campaign(*arguments, change=None):
    """The exit code, the facts on the last line, and what was said."""
    program = [str(BENCHMARK)]
    if change is not None:
        program = ["-c", BROKEN.format(folder=str(BENCHMARK.parent), change=change)]
    done = subprocess.run([sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_kills_and_faults_leave_the_same_bytes_and_nothing_else(tmp_path):
    log = tmp_path / "log"
    only = ("--only", "generate-calibration-data", "--only", "train-gpt", "--log", log)
    code, facts, said = campaign("--kills", 4, "--others", 8, *only)
    assert code == 0, said
    assert facts["kill"] == {"accidents": 4, "wrong": 0}
    assert all(facts[kind] == {"accidents": 2, "wrong": 0} for kind in ("interrupt", "stop", "full", "read-only"))
    before = log.read_text()
    assert campaign("--kills", 4, "--others", 8, *only) == (code, facts, said)
    assert log.read_text() == before


def test_a_full_disk_at_each_single_write_is_one_error_and_undone():
    code, facts, said = campaign("--kills", 0, "--others", 0, "--every", "--only", "generate")
    assert code == 0, said
    assert facts["full"]["accidents"] >= 5


def test_it_notices_what_is_left_over():
    only = ("--kills", 20, "--others", 0, "--only", "generate-calibration-data")
    code, facts, said = campaign(*only, change="atomic.remove_temporaries = lambda path: None")
    assert code == 1
    assert facts["kill"]["wrong"] > 0
    assert "left over: calib/" in said
