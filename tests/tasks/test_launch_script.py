"""Job scripts: what they hold, and that no value of a recipe is read by a shell or by sbatch as anything else."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import launch_script as subject
from tasks.errors import SpecError
from tasks.launch_script import Work
from tasks.specs import LaunchSpec, TrainSpec
from tests.commands import write_commands
from tests.tasks.train.launched import LORA_ONLY

GOLDEN = Path(__file__).with_name("data") / "job.sbatch"
WORK = Work(
    name="tatara-0123abcd-ef",
    module="tasks.train.worker",
    folder="/shared/tatara/adapter/0123abcd",
    root="/shared/checkout",
    python="/shared/venv/bin/python",
    variables={"PYTHONPATH": "/shared/checkout"},
)
SEED = LaunchSpec(  # _sft_llama.sh, sft_llama.sh and ray_cluster.sh of the seed
    launcher="slurm",
    nodes=2,
    gpus_per_node=8,
    gpu_memory_gb=80,
    partition="team",
    nodelist="osk-gpu[02-03]",
    time_limit="6-00:00:00",
    cpus_per_task=64,
    setup=("source /etc/profile.d/modules.sh", "module reset", "module load hpcx/2.18.1-gcc-cuda12/hpcx-mt"),
    environment={
        "NCCL_SOCKET_IFNAME": "enp25s0np0",
        "NVTE_FUSED_ATTN": "0",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "NCCL_IB_GID_INDEX": "3",
    },
)
_PLAIN = {"nodes": 1, "gpus_per_node": 1, "setup": (), "environment": {}}
anything = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" "), max_size=12)
hostile = st.one_of(
    anything, st.sampled_from(["$(touch x)", "`id`", "a'b", 'a"b', "\\", "${HOME}", "a;b", "&", "#", "*"])
)


def test_the_seeds_job_is_this_script():
    assert subject.render_job(SEED, WORK) == GOLDEN.read_text()


def run_script(script: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Run a script with stand-ins for SLURM's commands and for Python; return words and variables of each start."""
    tools = folder.parent / "tools"
    stand_ins = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo n1",
        "trainer": 'printf \'%s\\0\' "$@" > "$TOLD.argv"; env -0 > "$TOLD.env"; touch result.json',
        "prefix": 'exec "$@"',
    }
    write_commands(tools, stand_ins)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "TOLD": str(tools / "told"), **slurm}
    done = subprocess.run(["bash", "-c", script, "job", "1"], env=env, capture_output=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    words, variables = ((tools / f"told.{kind}").read_text().split("\0")[:-1] for kind in ("argv", "env"))
    return words, dict(pair.split("=", 1) for pair in variables)


@given(
    st.dictionaries(st.from_regex(r"NCCL_[A-Z]{1,6}", fullmatch=True), hostile, max_size=3),
    st.lists(hostile.filter(lambda word: "=" not in word), max_size=3),
    st.sampled_from(["plain", "with blank", "mit umlaut ä", "$HOME", "a;b", "`id`", "(x)"]),
)
@settings(max_examples=15, deadline=None)
def test_every_value_arrives_as_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str], words: list[str], name: str
):
    outside = tmp_path_factory.mktemp("job")
    folder = outside / name
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    work = Work(name="tatara-x", module="tasks.train.worker", folder=str(folder), root="/", python="trainer")
    launch = LaunchSpec(
        launcher="slurm", nodes=1, environment=variables, command_prefix=("prefix", "trainer", *words), python="-"
    )
    script = subject.render_job(launch, work)
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
    argv, env = run_script(script, folder)
    assert argv[: len(words) + 3] == [*words, "-", "-m", "torch.distributed.run"]
    assert argv[-3:] == ["-m", "tasks.train.worker", f"{folder}/job.json"]
    assert {key: env[key] for key in variables} == variables
    assert {path.name for path in outside.iterdir()} == {name, "tools"}
    joined = LaunchSpec.model_validate(launch.model_dump() | {"launcher": "torchrun", "address": "h", "nodes": 2})
    (folder / "result.json").unlink()
    argv, env = run_script(subject.render_join(joined, work), folder)
    assert argv[: len(words)] == words and argv[-1] == f"{folder}/job.json"
    assert {key: env[key] for key in variables} == variables


@given(
    st.sampled_from(["partition", "account", "qos", "nodelist", "time_limit", "memory", "gpu_type", "address"]),
    st.text(max_size=12),
)
def test_what_would_break_out_of_its_line_is_refused(field: str, value: str):
    try:
        spec = LaunchSpec.model_validate({"launcher": "slurm", "gpu_memory_gb": 80, "gpus_per_node": 1, field: value})
    except ValidationError:
        return
    lines = [line for line in subject.render_job(spec, WORK).split("\n") if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r'#SBATCH --[a-z-]+(=("[^"]*"|[^\s"\'\\#`$;]*))?', line) for line in lines)
    script = subject.render_job(spec, WORK)
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
    if field != "address":
        assert (
            script.split("\n# Made by")[1]
            == subject.render_job(SEED.model_copy(update=_PLAIN), WORK).split("\n# Made by")[1]
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": "a b"}, "it would break out of its #SBATCH line"),
        ({"partition": "a\n#SBATCH --wrap=x"}, "it would break out of its #SBATCH line"),
        (
            {"environment": {"HF_TOKEN": "x"}},
            "HF_TOKEN would stand in recipes and job scripts: set it in the environment",
        ),
        ({"environment": {"A B": "x"}}, "'A B' is no name of a variable"),
        ({"environment": {"A": "x\ny"}}, "the value of A holds a line break"),
        ({"setup": ("export WANDB_API_KEY=1",)}, "it sets WANDB_API_KEY, which would stand in recipes"),
        ({"environment": {"HTTPS_PROXY": "http://u:pw@proxy:3128"}}, "HTTPS_PROXY would stand in recipes and job"),
        ({"setup": ("export ALL_PROXY=http://u:pw@proxy:3128",)}, "holds a URL with a login, which would stand in"),
        ({"command_prefix": ("apptainer", "docker://u:pw@hub/image")}, "holds a URL with a login"),
        ({"environment": {"DB": "postgres://u:pw@h/db"}}, "DB would stand in recipes and job scripts"),
        ({"setup": ("huggingface-cli login --token hf_x",)}, "it sets token, which would stand in recipes"),
        ({"setup": ("a\nb",)}, "give each line by itself"),
        ({"sbatch_options": ("--output=/etc/x",)}, "--output is set by Tatara"),
        ({"sbatch_options": ("-x n1",)}, "is not --name or --name=value"),
        ({"sbatch_options": ("--comment",)}, "--comment is set by Tatara"),
        ({"gpus_per_node": 8}, "gpu_memory_gb is 0: say the memory of one GPU"),
        ({"gpus_per_node": 8, "processes_per_node": 4}, "processes_per_node=4 but gpus_per_node=8"),
        ({"launcher": "torchrun"}, "launcher='torchrun' needs address"),
        ({"launcher": "local", "nodes": 2}, "launcher='local' trains on this machine alone"),
    ],
)
def test_a_launch_that_can_not_work_is_refused_with_a_way_out(changes: dict[str, object], said: str):
    with pytest.raises(ValidationError, match=re.escape(said)):
        LaunchSpec.model_validate({"launcher": "slurm", **changes})


@pytest.mark.parametrize("folder", ["/a'b", '/a"b', "/a\\b", "/a%jb", "/a\nb", "relative"])
def test_a_folder_that_sbatch_reads_differently_is_refused(folder: str):
    with pytest.raises(SpecError, match="move TATARA_HOME"):
        subject.require_plain(folder)


def test_where_it_runs_is_no_part_of_the_key():
    """Also of every adapter that was trained before there was a launcher."""
    spec = TrainSpec(lora=LORA_ONLY)
    assert spec.model_copy(update={"launch": SEED}).key_values() == spec.key_values()
    assert "launch" not in spec.key_values()


def test_another_setting_is_another_digest():
    one = subject.render_job(SEED, WORK)
    assert subject.digest_of(one) == subject.digest_of(subject.render_job(SEED, WORK))
    other = subject.render_job(SEED.model_copy(update={"partition": "other"}), WORK)
    assert subject.digest_of(one) != subject.digest_of(other)
    assert subject.digest_of(one) in re.findall(r"#SBATCH --comment=(\w{16})", one)
