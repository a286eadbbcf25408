"""Learn from rewards with TRL's GRPOTrainer on PEFT; knows no Prefect.

    python -m tasks.reinforce.worker job.json

Ring: edge.
"""

import math
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils import logging as transformers_logging
from trl.trainer.grpo_config import GRPOConfig

from tasks import files
from tasks.adapters import load_base, lora_config, remember_start, require_moved, save_adapter, widen_adapter
from tasks.checkpoints import is_complete, latest_checkpoint
from tasks.errors import AccessError, DataError, RewardError, TransientError
from tasks.gptoss.forward import factor_experts, fuse_norms
from tasks.gptoss.layout import MODEL_TYPE
from tasks.lifeline import lifeline
from tasks.metrics import read_metrics
from tasks.recorder import say
from tasks.reinforce import vllm_engine
from tasks.reinforce.attention import choose_attention
from tasks.reinforce.continuous import ContinuousEngine, require_pages
from tasks.reinforce.group import GroupTrainer, Wanted
from tasks.reinforce.own import load_reward
from tasks.reinforce.prompts import Prompt, collect_prompts, completion_tokens, require_enough
from tasks.reinforce.recorder import GroupRecorder, PeriodKeeper, is_good_enough
from tasks.reinforce.rewards import number
from tasks.reinforce.rollouts import has_graphs
from tasks.reinforce.said import Said
from tasks.specs import ReinforceSpec
from tasks.training import RESULT, fix_seeds, outcome, require_end, run_worker


def reinforce(job: dict[str, Any]) -> None:  # Any: JSON values
    """Learn, or go on from the newest whole checkpoint; leave `adapter/` and result.json."""
    folder, spec = Path(job["folder"]), ReinforceSpec.model_validate(job["spec"])
    transformers_logging.disable_progress_bar()
    fix_seeds(spec.seed)
    trainer = make_trainer(job, spec)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    start = remember_start(trainer, folder / "adapter_start.json")
    documents = pq.read_table(Path(job["packed_folder"]) / "validation_documents.parquet").to_pylist()
    before = evaluate_once(trainer, documents, folder / "evaluation_before.json")
    fix_seeds(spec.seed)  # what is sampled must not depend on who evaluated, and how
    run_to_end(trainer, checkpoint, spec)
    after = answer_loss(trainer, documents)
    if trainer.state.global_step > spec.warmup_steps:  # at rate 0, or with equal rewards in each group, nothing moves
        require_moved(trainer, start, 1 if job.get("start_adapter") is None else 0)
    save_adapter(trainer, folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    rewards = [record["reward"] for record in metrics if record.get("reward") is not None]
    tenth = max(1, len(rewards) // 10)
    result = outcome(trainer, folder, before, after) | {
        "reward_before": sum(rewards[:tenth]) / tenth,
        "reward_after": sum(rewards[-tenth:]) / tenth,
    }
    say(
        f"mean reward {result['reward_before']:.3f} -> {result['reward_after']:.3f}, validation loss of the answers "
        f"{before:.4f} -> {after:.4f}"
    )
    files.write_json(folder / RESULT, result)


def make_trainer(job: dict[str, Any], spec: ReinforceSpec) -> GroupTrainer:  # Any: JSON values
    """Put model, prompts, rewards and settings together."""
    folder, base = Path(job["folder"]), Path(job["base_folder"])
    model, tokenizer = open_base(base, spec), AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    rows = pq.read_table(Path(job["packed_folder"]) / "train.parquet").to_pylist()
    prompts, _ = collect_prompts(rows, tokenizer)
    require_enough(len(prompts), spec)
    require_numbers(prompts, spec)
    rewards = {reward.column: (load_reward(reward), reward.weight) for reward in spec.rewards}
    engine = {"vllm": "vllm", "continuous": "transformers' continuous batching"}.get(spec.rollouts, "transformers")
    wanted = Wanted(prompts=prompts, rewards=rewards, least_share=spec.min_adapter_share, engine=engine)
    if engine == "vllm":
        vllm_engine.set_up(spec)
    if spec.rollouts == "continuous":
        require_pages(model)
        lengths = [len(prompt.ids) for prompt in prompts]
        wanted.continuous = ContinuousEngine(lengths, has_graphs=has_graphs(spec, model.config.to_dict()))
    ends = end_tokens(model, tokenizer)
    model.generation_config.eos_token_id = ends
    trainer = GroupTrainer(
        model=model,
        reward_funcs=wanted.functions(tokenizer, ends),
        args=trainer_arguments(folder, spec, prompts, ends),
        train_dataset=Dataset.from_dict(
            {"prompt": [str(number) for number in range(len(prompts))], "row": list(range(len(prompts)))}
        ),
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
    )
    trainer.wanted = wanted
    trainer.remove_callback(PrinterCallback)
    learning: Any = trainer.model  # Any: Trainer types it as optional
    widen_adapter(learning)
    if job.get("start_adapter"):
        start_from(learning, Path(job["start_adapter"]))
    if model.config.model_type == MODEL_TYPE and spec.kernels == "auto":
        factor_experts(learning)
        fuse_norms(learning)
    if engine == "vllm":
        vllm_engine.keep_in_step(trainer)
    trainer.add_callback(GroupRecorder(folder, trainer, spec))
    trainer.add_callback(PeriodKeeper(spec))
    say(f"{len(prompts)} questions, completions of at most {trainer.max_completion_length} tokens by {engine}")
    return trainer


def require_numbers(prompts: list[Prompt], spec: ReinforceSpec) -> None:
    """Raise SpecError for an answer without a number that the reward `number` would meet hours later."""
    if any(reward.name == "number" for reward in spec.rewards):
        for prompt in prompts:
            asked = {"question": prompt.question, "answer": prompt.answer}
            number(Said(**asked, text="", whole="", num_tokens=0, is_finished=False))


def open_base(folder: Path, spec: ReinforceSpec) -> PreTrainedModel:
    """Load the base with an attention that can generate and learn."""
    attention = choose_attention(AutoConfig.from_pretrained(folder).model_type, spec)
    model = load_base(folder, attention=attention, dtype=spec.dtype, quantization=spec.quantization)
    say(f"base: {model.num_parameters():,} parameters, attention {attention}")
    return model


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:  # Any: transformers has one class per family
    """Return the ids that end a completion: the model's own, the tokenizer's, and harmony's <|return|>."""
    config: Any = model.generation_config  # Any: typed as optional
    own = config.eos_token_id if config is not None else None
    ends = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id}
    ends.add(tokenizer.get_vocab().get("<|return|>"))
    return sorted(end for end in ends if end is not None)


def start_from(model: Any, folder: Path) -> None:  # Any: a PeftModel
    """Put an adapter's weights where the new one's would begin. Raises nothing: run.py has compared their shapes."""
    found = set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
    assert not found.unexpected_keys, found.unexpected_keys[:3]


def trainer_arguments(folder: Path, spec: ReinforceSpec, prompts: list[Prompt], ends: list[int]) -> GRPOConfig:
    """Return TRL's settings; vLLM reads the model's own ends from its folder, and is told of all here."""
    on_gpu = torch.cuda.is_available()
    recomputes = spec.checkpointing == "full" or (spec.checkpointing == "auto" and on_gpu)
    limit = completion_tokens(prompts, spec)
    return GRPOConfig(
        output_dir=str(folder / "checkpoints"),
        num_generations=spec.num_generations,
        max_completion_length=limit,
        per_device_train_batch_size=spec.rows_per_device,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=spec.warmup_steps,
        num_train_epochs=spec.num_epochs,
        max_steps=spec.max_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch_fused",
        beta=spec.beta,
        num_iterations=spec.num_iterations,
        epsilon=spec.epsilon,
        epsilon_high=spec.epsilon_high or None,
        loss_type=spec.loss_type,
        scale_rewards=spec.scale_rewards,
        reward_weights=[reward.weight for reward in spec.rewards],
        mask_truncated_completions=spec.mask_truncated,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        generation_kwargs={"stop_token_ids": ends} if spec.rollouts == "vllm" else {"use_cache": True},
        use_vllm=spec.rollouts == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=spec.vllm_memory_share,
        vllm_max_model_length=spec.max_sequence_tokens,
        # TRL's default multiplies the ratios of all tokens: of 256 tokens in bfloat16 hardly a completion was left.
        vllm_importance_sampling_mode="token_truncate",
        router_aux_loss_coef=0.0,  # the router is frozen: balancing it would only disturb the adapter
        gradient_checkpointing=recomputes,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recomputes else None,
        torch_compile=spec.torch_compile,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=spec.save_steps,
        seed=spec.seed,
        bf16=on_gpu and spec.dtype == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        run_name=folder.name,
        disable_tqdm=True,
    )


def evaluate_once(trainer: GroupTrainer, documents: list[dict[str, Any]], path: Path) -> float:  # Any: token columns
    """Return the base's loss of the reference answers, measured once and kept across resumes.

    Also of a run that goes on from an adapter: verify holds the served model against the base.
    """
    if not path.exists():
        learning: Any = trainer.accelerator.unwrap_model(trainer.model)  # Any: a PeftModel
        with learning.disable_adapter():
            files.write_json(path, {"eval_loss": answer_loss(trainer, documents)})
    return files.read_json(path)["eval_loss"]


@torch.no_grad()
def answer_loss(trainer: GroupTrainer, documents: list[dict[str, Any]]) -> float:  # Any: token columns
    """Return the mean -log p of the validation answers' tokens: what verify will hold the served model against."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)  # Any: a PeftModel
    device, total, count = next(model.parameters()).device, 0.0, 0
    was_training = model.training
    model.eval()  # no dropout
    for place, document in enumerate(documents):
        lifeline.beat("evaluate", place)
        asked, answer = document["prompt_ids"], document["answer_ids"]
        ids = torch.tensor([[*asked, *answer]], device=device)
        logits_TV = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_TV, ids[0, len(asked) :], reduction="sum")
        total, count = total + loss.item(), count + len(answer)
    model.train(was_training)
    return total / max(1, count)


class StepStart(TrainerCallback):
    """Keeps the random generators as they were after the last whole step.

    A reward that fails is found out in the middle of the next one: the checkpoint that is written then must be
    that of the step before, generators included, or a run that goes on from it would be another.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them."""
        on_gpu = torch.cuda.is_available()
        cuda = torch.cuda.get_rng_state_all() if on_gpu else None
        self.kept = (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put them back."""
        python, numpy, cpu, cuda = self.kept
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def run_to_end(trainer: GroupTrainer, checkpoint: Path | None, spec: ReinforceSpec) -> None:
    """Learn, or resume, or only load a run that is finished: Trainer would add one more step to it.

    Raises: Stopped when it returned before its end; RewardError of a reward that failed, TransientError, AccessError
        or DataError of a judge, with a checkpoint of the last whole step.
    """
    planned = planned_steps(trainer)
    if checkpoint is not None:
        say(f"resuming from {checkpoint.name}")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= planned or is_good_enough(state, spec):
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    begun = StepStart()
    trainer.add_callback(begun)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RewardError, TransientError, AccessError, DataError):  # of rewards: nothing of the step was learnt yet
        keep_last_step(trainer, begun)
        raise
    finally:
        if trainer.wanted.continuous:
            trainer.wanted.continuous.drop()
    require_end(trainer.state, planned, is_over=is_good_enough(trainer.state, spec))


def keep_last_step(trainer: GroupTrainer, begun: StepStart) -> None:
    """Write a checkpoint of the last whole step of a run that could not score the next one."""
    folder = Path(trainer.args.output_dir or ".")
    step = trainer.state.global_step
    if step == 0 or is_complete(folder / f"checkpoint-{step}"):
        return
    begun.restore()
    model: Any = trainer.model  # Any: Trainer types it as optional
    trainer._save_checkpoint(model, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def planned_steps(trainer: GroupTrainer) -> int:
    """Return the number of optimizer steps of the whole run, counted as Trainer counts them."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    per_epoch = max(1, len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def main(path: str) -> None:
    """Do the job that is described there; with vLLM in the process, end it without waiting for vLLM's own end."""
    job = files.read_json(Path(path))
    with_vllm = ReinforceSpec.model_validate(job["spec"]).rollouts == "vllm"
    try:
        run_worker(Path(job["folder"]), lambda: reinforce(job), stop_grace_s=job["spec"].get("stop_grace_s", 25.0))
    except BaseException as error:  # told to stop, too; why is written down
        if not with_vllm:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        vllm_engine.leave(1)
    if with_vllm:
        vllm_engine.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
