"""The shell scripts that start a trainer on several machines: by sbatch, as a job of Ray, or by hand (join.sh).

    LaunchSpec + Work -> render_job()  -> job.sbatch: one torchrun per node by srun, rendezvous at the first one
                      -> render_join() -> join.sh: what is started by hand on each other machine
                      -> first_argv()  -> the same on this machine
                      -> render_node() -> node.sh: what each node of a Ray job runs

What SLURM and torchrun do themselves is left to them: srun starts and ends all nodes together
(--kill-on-bad-exit), SLURM requeues after preemption and lost nodes, torchrun finds ranks and names the one that died.
The script adds two things: each node shows that it sees the job's folder, and at the end of the time limit the
trainer writes a checkpoint and the job goes back into the queue, if it got any further.

Ring: pure.  Units: seconds. Every value is quoted; LaunchSpec refuses what would break out of an #SBATCH line.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from string import Template

from tasks.errors import SpecError
from tasks.specs import LaunchSpec

JOIN_PORT = 29400  # torchrun's own default
NOT_SHARED, NO_PROGRESS = 66, 67  # exit status: a node does not see the folder; the time limit lets nothing be saved
JOIN_OVER = "join.over"  # a join.sh that finds it ends: the run was cancelled
STOP_ASKED = "stop.asked"  # a trainer that finds it ends after its step, with all the time that this takes
BEGINS = "tatara: job "  # the first line of a job's in output.log; what comes after it is of no earlier job
STARTS = "tatara: the trainer starts as "  # what comes after it in output.log is of this start
_OF_SBATCH = {"ACCOUNT": "account", "PARTITION": "partition", "QOS": "qos", "TIMELIMIT": "time_limit"}
_SAID_BY_NCCL = {  # a hang ends with an error and each rank's last collectives, in files that a person can read
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is started: a module on the job.json of a folder that every machine sees."""

    name: str
    module: str
    folder: str
    root: str  # of this checkout
    python: str
    variables: Mapping[str, str] = field(default_factory=dict)  # what the scripts bring along; no secrets

    @property
    def job_file(self) -> str:
        """What the module reads."""
        return f"{self.folder}/job.json"


def render_job(spec: LaunchSpec, work: Work) -> str:
    """Return the job script. Its comment is the digest of the rest, by which a running job is told from another.

    Raises: SpecError for a folder whose path sbatch would read differently.
    """
    require_plain(work.folder)
    values = {
        "setup": "\n".join(spec.setup),
        "exports": _exports(spec, work),
        "folder": shlex.quote(work.folder),
        "job_file": shlex.quote(work.job_file),
        "look": shlex.quote(_LOOK),
        "start": shlex.quote(_start(spec, work)),
        "address": shlex.quote(spec.address) if spec.address else _FIRST_NODE,
        "port": str(spec.master_port) if spec.master_port else "$((20000 + SLURM_JOB_ID % 20000))",
        "not_shared": str(NOT_SHARED),
        "no_progress": str(NO_PROGRESS),
        "begins": BEGINS,
        "starts": STARTS,
        "stop_asked": STOP_ASKED,
        "requeues": "true" if spec.requeue else "false",
    }
    body = Template(_JOB).substitute(values)
    options = _options(spec, work)
    digest = sha256("\n".join([*options, body]).encode()).hexdigest()[:16]
    lines = [f"#SBATCH {option}" for option in [*options, f"--comment={digest}"]]
    return "\n".join(["#!/bin/bash", *lines, body])


def digest_of(script: str) -> str:
    """Return the digest that a job script carries in its comment."""
    return next(line.partition("--comment=")[2] for line in script.splitlines() if "--comment=" in line)


def render_join(spec: LaunchSpec, work: Work) -> str:
    """Return the script that a person starts on each of the other machines, with the machine's number."""
    values = {
        "last": str(spec.nodes - 1),
        "folder": shlex.quote(work.folder),
        "exports": _exports(spec, work),
        "setup": "\n".join(spec.setup),
        "start": shlex.join(_torchrun(spec, work, is_host=False)),
        "over": JOIN_OVER,
    }
    return Template(_JOIN).substitute(values)


def first_argv(spec: LaunchSpec, work: Work) -> list[str]:
    """Return the command of the first machine of a run without SLURM, which the others find by its address."""
    return ["bash", "-c", _node(spec, work, f"exec {shlex.join(_torchrun(spec, work, is_host=True))}")]


def render_node(spec: LaunchSpec, work: Work) -> str:
    """Return what each node of a Ray job runs; ray_driver.py says which node it is, and where the first one is."""
    dumps = 'export TORCH_FR_DUMP_TEMP_FILE="$TATARA_LOGS/nccl_rank_"'
    return _node(spec, work, f"{dumps}\n{_start(spec, work, 'TATARA_NODE', 'TATARA_NODE', _OWN_ADDRESS)}")


def submit_variables(variables: Mapping[str, str], spec: LaunchSpec) -> dict[str, str]:
    """Return the environment for sbatch, which is also the job's.

    Not of a job that this process may be part of, nor another default of sbatch where the spec has a value: sbatch's
    variables overrule its script. GPUs are SLURM's to share out.

    >>> variables = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/c", "SBATCH_QOS": "a", "SBATCH_EXPORT": "NONE", "PATH": "/b"}
    >>> submit_variables(variables, LaunchSpec(launcher="slurm"))
    {'SLURM_CONF': '/c', 'SBATCH_QOS': 'a', 'PATH': '/b'}
    >>> submit_variables(variables, LaunchSpec(launcher="slurm", qos="b"))
    {'SLURM_CONF': '/c', 'PATH': '/b'}
    """
    kept: dict[str, str] = {}
    for name, value in variables.items():
        if name.startswith("SBATCH_"):
            knob = _OF_SBATCH.get(name.removeprefix("SBATCH_"))
            if knob is None or getattr(spec, knob):
                continue
        elif (name.startswith("SLURM_") and name != "SLURM_CONF") or name.startswith("TATARA_PROCESS"):
            continue
        if name != "CUDA_VISIBLE_DEVICES":
            kept[name] = value
    return kept


def require_plain(folder: str) -> None:
    """Raise SpecError for a folder whose name sbatch would read differently: it has quotes and patterns of its own."""
    odd = sorted({char for char in folder if char in "\"'\\%" or not char.isprintable()})
    if odd or not folder.startswith("/"):
        raise SpecError(
            f"the job's folder {folder!r} must be an absolute path without {' '.join(odd) or 'gaps'}: sbatch would "
            "read its name differently; move TATARA_HOME"
        )


def _options(spec: LaunchSpec, work: Work) -> list[str]:
    gpu_type = f"{spec.gpu_type}:" if spec.gpu_type else ""
    optional = {
        "gpus-per-node": f"{gpu_type}{spec.gpus_per_node}" if spec.gpus_per_node else "",
        "partition": spec.partition,
        "account": spec.account,
        "qos": spec.qos,
        "nodelist": spec.nodelist,
        "time": spec.time_limit,
        "cpus-per-task": str(spec.cpus_per_task) if spec.cpus_per_task else "",
        "mem": spec.memory,
    }
    return [
        f"--job-name={work.name}",
        f"--nodes={spec.nodes}",
        "--ntasks-per-node=1",
        f'--output="{work.folder}/output.log"',
        "--open-mode=append",
        "--export=ALL",
        f"--signal=B:USR1@{spec.stop_notice_s}",
        "--requeue" if spec.requeue else "--no-requeue",
        *(f"--{name}={value}" for name, value in optional.items() if value),
        *spec.sbatch_options,
    ]


def _exports(spec: LaunchSpec, work: Work) -> str:
    variables = {**work.variables, **_SAID_BY_NCCL, **spec.environment}
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def _node(spec: LaunchSpec, work: Work, start: str) -> str:
    return Template(_NODE).substitute(setup="\n".join(spec.setup), exports=_exports(spec, work), start=start)


def _start(
    spec: LaunchSpec, work: Work, number: str = "SLURM_NODEID", name: str = "SLURMD_NODENAME", more: str = ""
) -> str:
    """Return what runs on each node; the node's number and name, and the rendezvous, are variables there."""
    words = [*spec.command_prefix, spec.python or work.python, "-m", "torch.distributed.run", *_shape(spec)]
    late = (
        '--rdzv-endpoint="$TATARA_HEAD" --rdzv-id="$TATARA_RUN" '
        f'--rdzv-conf="is_host=$(({number} == 0)),read_timeout=600" '
        f'--log-dir="$TATARA_LOGS/${name}"{more}'
    )
    return f"exec {shlex.join(words)} {late} {shlex.join(['-m', work.module, work.job_file])}"


def _torchrun(spec: LaunchSpec, work: Work, *, is_host: bool) -> list[str]:
    endpoint = f"{spec.address}:{spec.master_port or JOIN_PORT}"
    rendezvous = [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={work.name}"]
    conf = f"--rdzv-conf=is_host={int(is_host)},read_timeout=600"
    python = [*spec.command_prefix, spec.python or work.python]
    return [*python, "-m", "torch.distributed.run", *_shape(spec), *rendezvous, conf, "-m", work.module, work.job_file]


def _shape(spec: LaunchSpec) -> list[str]:
    return [
        f"--nnodes={spec.nodes}",
        f"--nproc-per-node={spec.node_processes}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        "--tee=3",
    ]


# By the address that SLURM itself uses: a node's name need not be one that its peers can look up.
_FIRST_NODE = r"""$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
known="$(scontrol --oneliner show node "$address" | sed -nE 's/.* NodeAddr=([^ (]+).*/\1/p')"
address=${known:-$address}"""

_OWN_ADDRESS = ' --local-addr="$TATARA_ADDRESS"'  # else ranks meet by host names, which pods do not know of each other

_LOOK = """[ -r "$1/job.json" ] && mkdir -p "$1/nodes" && echo "$SLURM_JOB_ID" > "$1/nodes/$SLURM_NODEID" && exit
echo "tatara: node $SLURMD_NODENAME does not see $1" >&2; exit 66"""

_JOB = """\
# Made by Tatara. It may be submitted by hand too: it goes on from the newest whole checkpoint.
echo "$begins$$SLURM_JOB_ID"
$setup
$exports
folder=$folder
address=$address
export TATARA_HEAD="$$address:$port"
export TATARA_RUN="$$SLURM_JOB_ID-$${SLURM_RESTART_COUNT:-0}"
export TATARA_LOGS="$$folder/logs/$$TATARA_RUN"
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank$${rank}] '
export TORCH_FR_DUMP_TEMP_FILE="$$TATARA_LOGS/nccl_rank_"
newest() { find "$$folder/checkpoints" -name COMPLETE.json 2>/dev/null | sort -V | tail -n 1; }
begun_at="$$(newest)"
# Since SLURM 22.05 srun takes it from nowhere else: each node would train on one CPU.
[ -z "$${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$$SLURM_CPUS_PER_TASK"

srun --ntasks-per-node=1 bash -c $look look "$$folder" || exit $not_shared
mkdir -p "$$TATARA_LOGS"
rm -rf "$$folder"/failure*.json "$$folder/heartbeat.json" "$$folder/heartbeats" "$$folder/$stop_asked"
echo "$starts$$TATARA_RUN on $$SLURM_JOB_NODELIST"

is_over=false  # SLURM says shortly before the time limit that it ends
trap 'is_over=true; echo "tatara: the time limit is near"; touch "$$folder/$stop_asked"' USR1
trap 'echo "tatara: told to stop"' TERM  # the steps are told too; wait for their last checkpoint
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c $start &
step=$$!
while kill -0 "$$step" 2>/dev/null; do wait "$$step"; done  # a trap ends a wait with a status of its own
wait "$$step"
status=$$?
if [ "$$status" -ne 0 ] && $$is_over && $requeues; then
    if [ "$$(newest)" != "$$begun_at" ]; then
        echo "tatara: back into the queue"
        scontrol requeue "$$SLURM_JOB_ID" && sleep 60
    else
        exit $no_progress
    fi
fi
exit "$$status"
"""

_NODE = """\
# Made by Tatara.
$setup
$exports
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank$${rank}] '
$start
"""

_JOIN = """\
#!/bin/bash
# Made by Tatara: start it on each other machine with its number, 1 to $last. It goes on until the training is over.
node="$${1:?give the number of this machine, 1 to $last}"
[ -r $folder/job.json ] || { echo "this machine does not see" $folder >&2; exit 66; }
$setup
$exports
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank$${rank}] '
trap 'kill "$$run" 2>/dev/null; wait; exit 143' TERM INT
until [ -e $folder/result.json ] || [ -e $folder/$over ]; do
    $start &
    run=$$!
    wait "$$run"
    [ -e $folder/result.json ] || [ -e $folder/$over ] || sleep 5
done
[ ! -e $folder/$over ] || echo "the run was cancelled: start this again after it was started again"
"""
