"""The job's command, its lines and what a cluster must have: pure parts."""

import shlex

import pytest

from flows.recipes import llama1b_ppo_h100, resolve_ppo
from tasks.errors import CapacityError, SpecError
from tasks.metrics import read_metrics
from tasks.ppo.command import Inputs, count_steps, entrypoint, job_variables
from tasks.ppo.console import make_record, read_step
from tasks.ppo.demand import check_nodes, check_resources, read_facts
from tasks.ppo.metrics import StepLog
from tasks.specs import PpoSpec, RaySpec

INPUTS = Inputs(
    train_file="/d/train.parquet", test_file="/d/test.parquet", model="/m/llama", checkpoints="/a/checkpoints"
)
SEED = {
    "data.train_files=/d/train.parquet",
    "data.val_files=/d/test.parquet",
    "data.train_batch_size=256",
    "data.max_prompt_length=512",
    "data.max_response_length=256",
    "actor_rollout_ref.model.path=/m/llama",
    "actor_rollout_ref.actor.optim.lr=1e-06",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64",
    "critic.model.path=/m/llama",
    "critic.optim.lr=1e-05",
    "algorithm.kl_ctrl.kl_coef=0.001",
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=8",
    "trainer.project_name=competition_verl_test",
    "trainer.experiment_name=llama3.2_SFT_multinode_ppo",
}


def test_the_recipe_says_all_that_the_seed_says():
    words = shlex.split(entrypoint("/v/bin/python", llama1b_ppo_h100().ppo, INPUTS))
    assert words[:4] == ["/v/bin/python", "-u", "-m", "verl.trainer.main_ppo"]
    assert set(words) >= SEED


def test_a_word_with_a_blank_or_a_quote_stays_one_override():
    spec = PpoSpec(project_name="it's a test", overrides=("a.b=1",))
    words = shlex.split(entrypoint("python", spec, INPUTS))
    assert "trainer.project_name='it\\'s a test'" in words and words[-1] == "a.b=1"


def test_no_credential_can_be_put_into_a_job():
    with pytest.raises(ValueError, match="WANDB_API_KEY looks like a credential") as caught:
        PpoSpec(environment={"WANDB_API_KEY": "very-secret"})
    assert "WANDB_API_KEY" not in job_variables(PpoSpec(report_to="wandb"))
    with pytest.raises(SpecError) as said:
        resolve_ppo("tiny_ppo", {"ppo": {"environment": {"HF_TOKEN": "very-secret"}}})
    assert "very-secret" not in str(said.value), caught
    for proxy in ("http://ada:very-secret@proxy:3128", "ada:very-secret@proxy:3128"):
        with pytest.raises(SpecError, match="https_proxy looks like a credential") as said:
            resolve_ppo("tiny_ppo", {"ppo": {"environment": {"https_proxy": proxy}}})
        assert "very-secret" not in str(said.value)
    assert PpoSpec(environment={"HTTPS_PROXY": "http://proxy:3128"}).environment


@pytest.mark.parametrize(
    "word",
    [
        "trainer.wandb_api_key=very-secret",
        "trainer.wandb_key=very-secret",
        "+data.api_key=very-secret",
        "+actor_rollout_ref.hf_token=very-secret",
        "+actor_rollout_ref.download={hub: {hf_token: very-secret}}",
        "+ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN=very-secret",
        "+ray_kwargs.ray_init.runtime_env={env_vars:{HF_TOKEN:very-secret}}",
        "+ray_kwargs.ray_init.runtime_env.env_vars={'HF_TOKEN':'very-secret'}",
        "+trainer.wandb_proxy=http://ada:very-secret@proxy:3128",
        "trainer.api_key=${oc.env:API_KEY,very-secret}",
    ],
)
def test_no_credential_can_be_put_into_an_override(word: str):
    with pytest.raises(SpecError, match="looks like a credential") as said:
        resolve_ppo("tiny_ppo", {"ppo": {"overrides": [word]}})
    assert "very-secret" not in str(said.value)


@pytest.mark.parametrize(
    "word",
    [
        "data.prompt_key=question",
        "+algorithm.gdpo_reward_keys=[accuracy,format]",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
        "actor_rollout_ref.rollout.max_num_batched_tokens=8192",
        "critic.forward_max_token_len_per_gpu=${.ppo_max_token_len_per_gpu}",
        "actor_rollout_ref.actor.loss_agg_mode=token-mean",
        "trainer.wandb_api_key=${oc.env:WANDB_API_KEY}",
        "+ray_kwargs.ray_init.runtime_env.env_vars.NCCL_DEBUG=INFO",
        "~reward.api_key",
    ],
)
def test_what_verl_counts_and_names_is_no_credential(word: str):
    assert PpoSpec(overrides=(word,)).overrides == (word,)


def test_variables_of_a_job_are_not_set_as_a_whole():
    with pytest.raises(ValueError, match="sets variables of the job as a whole: name each"):
        PpoSpec(overrides=("+ray_kwargs.ray_init.runtime_env={env_vars:${mine}}",))


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://h:10001", "http://u:p@h:8265", "http://h:8265/api"])
def test_an_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(ValueError, match="expected the dashboard's URL"):
        RaySpec(address=address)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_batch_size": 100}, "train_batch_size=100 must be a multiple of ppo_mini_batch_size=64"),
        ({"n_gpus_per_node": 7}, "ppo_mini_batch_size=64 is shared by nnodes \\* n_gpus_per_node = 14"),
        ({"rollout_tensor_parallel": 3}, "must divide the 16 GPUs"),
        ({"overrides": ("--help",)}, "no hydra override"),
    ],
)
def test_batches_that_verl_would_refuse_are_refused_here(fields, message):
    with pytest.raises(ValueError, match=message):
        PpoSpec(**fields)


def test_steps_are_whole_batches_of_an_epoch():
    assert count_steps(7473, PpoSpec(total_epochs=15)) == 29 * 15
    assert count_steps(7473, PpoSpec(total_training_steps=3)) == 3


def test_verls_lines_become_records_and_other_lines_do_not():
    line = (
        "\x1b[36m(TaskRunnerV1 pid=812, ip=10.0.0.2)\x1b[0m step:4 - training/global_step:4 - critic/score/mean:0.25"
        " - actor/grad_norm:nan - perf/time_per_step:np.float64(3.5) - val-core/openai/gsm8k/reward/mean@1:0.5"
    )
    step, values = read_step(line) or (0, {})
    assert step == 4 and values["perf/time_per_step"] == 3.5 and "actor/grad_norm" not in values
    record = make_record(step, values, 10, 2)
    assert (record["reward"], record["test_score"], record["attempt"]) == (0.25, 0.5, 2)
    assert read_step("Training Progress: 40%|####| 4/10 step:4") is None
    assert read_step("stepping over step: nothing") is None


def _add(log, *pairs):
    return [log.add({"step": step, "num_steps": 9, "attempt": attempt, "reward": 0.5}) for step, attempt in pairs]


def test_each_step_is_written_once_however_often_a_log_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert _add(StepLog(path), (0, 1), (1, 1), (2, 1), (3, 1)) == [True] * 4
    with path.open("a") as torn:
        torn.write('{"step": 4, "num')  # a kill in the middle of a line
    again = StepLog(path)
    assert _add(again, (0, 1), (1, 1), (2, 1), (3, 1), (4, 1)) == [False] * 4 + [True]
    resumed = StepLog(path)  # the job died; verl goes on from the checkpoint of step 2, at which it tests again
    assert not resumed.add({"step": 2, "num_steps": 9, "attempt": 2, "test_score": 0.5})
    assert _add(resumed, (3, 2), (4, 2), (5, 2)) == [True] * 3
    assert [(r["step"], r["attempt"]) for r in read_metrics(path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_cluster_that_is_too_small_is_told_what_is_missing():
    with pytest.raises(CapacityError) as caught:
        check_resources([{"CPU": 2.0, "GPU": 1.0}], PpoSpec(), "http://h:8265")
    assert str(caught.value) == (
        "the run needs 2 nodes with 8 GPU each, but the cluster at http://h:8265 has 1 node: one with 1 GPU, 2 CPU. "
        "Start Ray on 2 more nodes of 8 GPU, or lower PpoSpec.nnodes and n_gpus_per_node"
    )


def test_every_fault_of_every_node_is_said():
    good = {
        "address": "a",
        "resources": {},
        "python": "3.11",
        "ray": "2.60.0",
        "verl": "0.9.1",
        "error": "",
        "unseen": [],
        "lacking": [],
    }
    assert "verl 0.9.1" in check_nodes(read_facts([good, {**good, "address": "b"}]), "u")
    rows = [
        good,
        {**good, "address": "b", "unseen": ["/x"], "verl": "0.8.0"},
        {**good, "address": "c", "lacking": ["WANDB_API_KEY"]},
        {**good, "address": "d", "error": "verl is not installed for /p"},
    ]
    with pytest.raises(SpecError) as caught:
        check_nodes(read_facts(rows), "u")
    for said in (
        "b does not see /x",
        "c has no WANDB_API_KEY",
        "d: verl is not installed",
        "versions of verl: 0.8.0, 0.9.1",
    ):
        assert said in str(caught.value)
