"""A child for one question ends with whoever asked, also when he is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.children import bound, run_child
from tests.waiting import runs, wait_for

ROOT = Path(__file__).resolve().parents[2]


def test_code_and_output_come_back(tmp_path: Path):
    program = "import os, sys; print(os.environ['WORD'], os.getcwd()); sys.exit(7)"
    code = run_child([sys.executable, "-c", program], {"WORD": "said"}, tmp_path / "log", folder=tmp_path)
    assert (code, (tmp_path / "log").read_text()) == (7, f"said {tmp_path}\n")


def test_one_that_takes_too_long_is_ended(tmp_path: Path):
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_child([sys.executable, "-c", program], os.environ, tmp_path / "log", timeout_s=3.0)
    assert not runs(int((tmp_path / "pid").read_text()))


def test_one_whose_parent_is_gone_already_does_not_begin(tmp_path: Path):
    argv = bound([sys.executable, "-c", "print('began')"])
    argv[argv.index(str(os.getpid()))] = "1" if os.getpid() != 1 else "2"
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the process that asked is gone\n")


PARENTS = {
    "evaluate": (
        "from tasks.evaluate.plugins import run; "
        "run('lm_eval:t', [], Path({folder!r}), {{**os.environ, 'TATARA_LM_EVAL_PYTHON': {program!r}}})"
    ),
    "evaluate's worker": (
        "from tasks.evaluate import run; from types import SimpleNamespace as N; from tasks.specs import EvaluateSpec; "
        "run.sys = N(executable={program!r}); "
        "run._ask_files(N(folder='m'), N(dtype='float32', spec=EvaluateSpec()), [], [], 'cpu', Path({folder!r}))"
    ),
    "verify's reference": (
        "from tasks.verify import scoring as run; from types import SimpleNamespace as N; "
        "run.sys = N(executable={program!r}); "
        "run._run_reference(Path({folder!r}))"
    ),
    "merge's check": (
        "from tasks.merge import peft_check as check; from types import SimpleNamespace as N; "
        "check.sys = N(executable={program!r}); check.PeftSide(Path('a'), Path('b'), Path({folder!r})); time.sleep(600)"
    ),
}


@pytest.mark.parametrize("who", sorted(PARENTS))
def test_it_does_not_outlive_a_parent_that_is_killed(who: str, tmp_path: Path):
    program, pid_file = tmp_path / "program", tmp_path / "pid"
    program.write_text(
        f"#!{sys.executable}\nimport os, time\nopen({str(pid_file)!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
    )
    with program.open("a") as handle:
        handle.write("time.sleep(600)\n")
    program.chmod(0o755)
    words = PARENTS[who].format(folder=str(tmp_path), program=str(program))
    parent = subprocess.Popen([sys.executable, "-c", f"import os, time; from pathlib import Path; {words}"], cwd=ROOT)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), 60)
        child = int(pid_file.read_text())
        time.sleep(0.1)
        assert runs(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    try:
        wait_for(lambda: not runs(child))
    finally:
        if runs(child):
            os.kill(child, signal.SIGKILL)
