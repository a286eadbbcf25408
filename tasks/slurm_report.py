"""What SLURM says of a job, read from `scontrol show job` or `sacct`.

    scontrol show job --oneliner -> read_job()        -> JobReport
    sacct --parsable2            -> read_accounting() -> JobReport

Ring: pure.
"""

import re
from dataclasses import replace

from tasks.job_report import JobReport

_FIELD = re.compile(r"(?:^| )(JobId|JobName|JobState|Reason|Restarts|ExitCode|NodeList|StartTime|Comment)=(\S*)")


def read_job(line: str) -> JobReport:
    """Read a line of `scontrol show job --oneliner`.

    >>> job = read_job("JobId=7 JobName=x JobState=PENDING Reason=Resources Restarts=1 ExitCode=0:0 NodeList=(null)")
    >>> job.job_id, job.state, job.reason, job.restarts, job.nodes
    ('7', 'PENDING', 'Resources', 1, '')
    """
    found = {name: value for name, value in _FIELD.findall(line) if value not in ("(null)", "None", "Unknown")}
    return JobReport(
        job_id=found.get("JobId", ""),
        name=found.get("JobName", ""),
        state=found.get("JobState", ""),
        reason=found.get("Reason", ""),
        restarts=int(found.get("Restarts", "0")),
        exit_code=found.get("ExitCode", ""),
        nodes=found.get("NodeList", ""),
        starts_at=found.get("StartTime", ""),
        comment=found.get("Comment", ""),
    )


def read_accounting(job_id: str, lines: str) -> JobReport:
    """Read `sacct --parsable2 --noheader --format=State,ExitCode,NodeList`; of a requeued job the last line counts.

    >>> read_accounting("7", "CANCELLED by 0|0:15|n[1-2]").state
    'CANCELLED'
    """
    rows = [line.split("|") for line in lines.splitlines() if line.count("|") == 2]
    blank = JobReport(job_id=job_id)
    if not rows:
        return blank
    state, code, nodes = rows[-1]
    return replace(blank, state=state.partition(" ")[0], exit_code=code, nodes=nodes.replace("None assigned", ""))


def is_passing(words: str) -> bool:
    """Say whether SLURM's own words mean that it is away for a moment.

    >>> is_passing("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")
    True
    >>> is_passing("sbatch: error: Batch job submission failed: Invalid partition name specified")
    False
    """
    signs = (
        *("unable to contact", "timed out", "temporarily", "connection refused", "connect failure", "communication"),
        *("socket", "zero bytes", "transport endpoint", "munge encode failed", "connection reset"),
    )
    return any(sign in words.lower() for sign in signs)


def is_unknown(words: str) -> bool:
    """Say whether SLURM's own words mean that there is no such job (any more).

    >>> is_unknown("slurm_load_jobs error: Invalid job id specified")
    True
    """
    return "invalid job id" in words.lower()
