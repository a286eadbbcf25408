"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, without systemd, on ports of their own.

Debian's packages (slurmctld, slurmd, slurm-client, munge) have what it takes: slurmd runs several times on a host
(-N). It runs as root, since slurmd starts each job as its user.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_CONF = """\
ClusterName=tatara
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=300
JobRequeue=1
UnkillableStepTimeout=120
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=1 RealMemory=16000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=1 RealMemory=16000
PartitionName=low Nodes=n1,n2 Default=YES State=UP PriorityTier=1 MaxTime=60
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10 MaxTime=60
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where it lies, and how its commands are run."""

    folder: Path

    @property
    def conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.folder / "slurm.conf"

    @property
    def blind(self) -> Path:
        """A folder of which the second node sees another one, as of a disk that is not shared."""
        return self.folder / "blind"

    def run(self, *words: str) -> str:
        """Run one of SLURM's commands; return what it printed."""
        env = {"PATH": os.environ["PATH"], "SLURM_CONF": str(self.conf)}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=60).stdout

    def jobs(self) -> dict[str, str]:
        """Return id -> state of every job that the controller remembers."""
        said = self.run("squeue", "--states=all", "--noheader", "--format=%A %T")
        return dict(line.split() for line in said.splitlines())


def why_not() -> str:
    """Say why SLURM can't be run here; empty when it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}): `make slurm-test` installs Debian's packages as root"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as their users, which takes root"


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in `folder` and end it, with all that it runs."""
    ports = {name: free_port() for name in ("ctld", "n1", "n2")}
    cluster = Cluster(folder=folder)
    for name in ("state", "blind"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged wants its socket where others may look
    cluster.conf.write_text(_CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], **ports))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(64))
    (folder / "munge.key").chmod(0o400)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in names.items())]
    started = [_start(munge, folder)]
    try:
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        started.append(_start(["slurmctld", "-D", "-f", str(cluster.conf)], folder))
        for name in ("n1", "n2"):
            (folder / f"spool-{name}").mkdir()
            daemon = ["slurmd", "-D", "-N", name, "-f", str(cluster.conf)]
            started.append(_start(_without_sight(cluster.blind, daemon) if name == "n2" else daemon, folder))
        _wait(lambda: _are_idle(cluster), folder)
        yield cluster
    finally:
        with suppress(subprocess.SubprocessError):
            cluster.run("scancel", "--signal=KILL", "--full", "--user=root")
            cluster.run("scancel", "--user=root")
            _wait(lambda: _are_idle(cluster), folder)
        for process in reversed(started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def _without_sight(path: Path, argv: list[str]) -> list[str]:
    """Return the command with an empty disk over a folder, in a mount namespace of its own."""
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(path), *argv]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


def _start(argv: list[str], folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "daemons.log").open("ab")
    return subprocess.Popen(argv, stdout=log, stderr=log, env={"PATH": _path(), "HOME": "/root"}, cwd=folder)


def _are_idle(cluster: Cluster) -> bool:
    try:
        return cluster.run("sinfo", "--noheader", "--partition=low", "--format=%D %T").split() == ["2", "idle"]
    except subprocess.SubprocessError:
        return False


def _wait(condition: "object", folder: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"the cluster in {folder} does not get there:\n{logs}")
        time.sleep(0.2)
