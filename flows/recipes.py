"""Named recipes: the only place where hyper-parameters are chosen.

    resolve("tiny", {"train": {"max_steps": 10}}) -> Recipe

A recipe is code, so a name and a commit reproduce a run; what a caller changed is stored beside it.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from tasks.errors import SpecError
from tasks.specs import (
    BaseModelSpec,
    BaseRelease,
    EvaluateSpec,
    FetchSpec,
    GptOssShape,
    LoraSpec,
    MergeSpec,
    PackSpec,
    PpoRecipe,
    PpoSpec,
    PretrainSpec,
    PromoteSpec,
    QuestionsSpec,
    RaySpec,
    Recipe,
    ReinforceRecipe,
    ReinforceSpec,
    RewardSpec,
    ServeSpec,
    TrainSpec,
    VerifySpec,
    change,
)

RecipeName = Literal[
    "tiny",
    "gptoss20b_lora_h100",
    "gptoss20b_experts_h100",
    "gptoss120b_lora_8x80gb",
    "gptoss120b_lora_80gb",
    "qwen_qlora_16gb",
    "qwen14b_qlora_16gb",
    "qwen110b_qlora_80gb",
    "qwen110b_qlora_24gb",
]
PretrainName = Literal["tiny", "compact_1b4"]
PpoName = Literal["llama1b_ppo_h100", "tiny_ppo"]
ReinforceName = Literal["tiny_grpo", "gptoss20b_grpo_h100"]
F = TypeVar("F")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def tiny() -> Recipe:
    """The embedded default: a small gpt-oss pretrained here, tuned on the shipped chats, on two CPU cores."""
    return Recipe(
        base=BaseModelSpec(model="pretrain:tiny"),
        fetch=FetchSpec(source="shipped"),
        pack=PackSpec(row_tokens=512),
        train=TrainSpec(
            lora=LoraSpec(
                rank=8,
                alpha=16,
                target_modules=_ATTENTION,
                target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            ),
            learning_rate=1e-2,
            warmup_steps=4,
            max_steps=56,
            rows_per_device=2,
            dtype="float32",
            save_steps=20,
        ),
        merge=MergeSpec(),
        serve=ServeSpec(
            served_model_name="tatara-tiny",
            max_model_len=1024,
            dtype="float32",  # bf16 files computed in float32: served and reference agree to five digits
            max_num_seqs=8,
            cpu_kv_cache_bytes=64 << 20,
            start_timeout_s=300.0,
        ),
        verify=VerifySpec(max_logprob_gap=0.005, min_base_margin=0.1, may_break_format=True),
        evaluate=EvaluateSpec(  # 53 M parameters know no refusals: those figures are shown and decide nothing
            min_base_margin=0.1, min_safety_score=0.0, max_safety_drop=1.0, max_answer_tokens=24
        ),
        promote=PromoteSpec(canary_share=0.0),  # nobody asks the demo's model: a canary would wait in vain
    )


def gptoss20b_lora_h100() -> Recipe:
    """gpt-oss-20b on one 80 GB GPU: the seeds' recommended start, expert down_proj of three layers."""
    return Recipe(
        base=BaseModelSpec(model="openai/gpt-oss-20b"),
        fetch=FetchSpec(source="shipped"),
        pack=PackSpec(row_tokens=4096),
        train=TrainSpec(
            lora=LoraSpec(
                rank=8,
                alpha=16,
                target_parameters=(
                    "7.mlp.experts.down_proj",
                    "15.mlp.experts.down_proj",
                    "23.mlp.experts.down_proj",
                ),
            ),
            learning_rate=2e-4,
            warmup_steps=5,
            num_epochs=3,
            rows_per_device=1,
            gradient_accumulation=4,
            save_steps=50,
        ),
        serve=ServeSpec(served_model_name="gpt-oss-20b"),
        verify=VerifySpec(max_logprob_gap=0.05),
    )


def gptoss20b_experts_h100() -> Recipe:
    """gpt-oss-20b on one 80 GB GPU: every expert of every layer, 20 times the parameters of the seeds' start."""
    every_expert = {"target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
    return change(gptoss20b_lora_h100(), {"train": {"lora": every_expert}})


def gptoss120b_lora_8x80gb() -> Recipe:
    """gpt-oss-120b on eight 80 GB GPUs, its base shared out over them: the start of 20b at the same depths.

    Never run on the true weights. `train.launch` puts it on several nodes (docs/scaling.md); a base that is stored in
    bfloat16 is loaded without a copy in each process.
    """
    thirds = tuple(f"{layer}.mlp.experts.down_proj" for layer in (11, 23, 35))
    return change(
        gptoss20b_lora_h100(),
        {
            "base": {"model": "openai/gpt-oss-120b"},
            "train": {
                "lora": {"target_parameters": thirds},
                "num_processes": 8,
                "gradient_accumulation": 1,
                "parallel": "fsdp2",
            },
            "serve": {"served_model_name": "gpt-oss-120b"},
        },
    )


def gptoss120b_lora_80gb() -> Recipe:
    """gpt-oss-120b on one GPU: adapters on the experts of the last three layers, the others rest on the host in MXFP4.

    38 GB of the GPU and 80 GB of the host's memory; merged into MXFP4 again, so that one 80 GB GPU can serve it. Never
    run on the true weights.
    """
    last = tuple(f"{layer}.mlp.experts.{name}" for layer in (33, 34, 35) for name in ("gate_up_proj", "down_proj"))
    return change(
        gptoss20b_lora_h100(),
        {
            "base": {"model": "openai/gpt-oss-120b"},
            "train": {"lora": {"target_parameters": last}, "offload_layers": 33},
            "merge": {"experts": "mxfp4"},
            "serve": {"served_model_name": "gpt-oss-120b"},
        },
    )


def qwen_qlora_16gb() -> Recipe:
    """A dense 7 B model by QLoRA on one 16 GB GPU: the Colab seed's adapter, steps that fit the shipped chats."""
    return Recipe(
        base=BaseModelSpec(model="Qwen/Qwen2.5-7B-Instruct"),
        fetch=FetchSpec(source="shipped"),
        pack=PackSpec(row_tokens=1024),
        train=TrainSpec(
            lora=LoraSpec(rank=64, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj")),
            learning_rate=2e-4,
            warmup_steps=5,
            num_epochs=3,
            rows_per_device=1,
            gradient_accumulation=4,
            quantization="nf4",
            save_steps=50,
        ),
        serve=ServeSpec(served_model_name="qwen2.5-7b", max_model_len=4096),
        verify=VerifySpec(max_logprob_gap=0.05),
    )


def qwen14b_qlora_16gb() -> Recipe:
    """The same for 14 B, whose weights leave room for 2,048 tokens at a time on 16 GB."""
    return change(
        qwen_qlora_16gb(),
        {"base": {"model": "Qwen/Qwen2.5-14B-Instruct"}, "serve": {"served_model_name": "qwen2.5-14b"}},
    )


def qwen110b_qlora_80gb() -> Recipe:
    """A dense model of the 100 B class by QLoRA on one 80 GB GPU: a template, adapters on the last eight layers only.

    Ask `tatara fit` first. A mixture of experts can't be tuned like this: bitsandbytes makes Linear layers small, not
    the 3-D experts that such a model is made of.
    """
    last_layers = tuple(f"{layer}.self_attn.{name}" for layer in range(72, 80) for name in ("q_proj", "v_proj"))
    return change(
        qwen_qlora_16gb(),
        {
            "base": {"model": "Qwen/Qwen1.5-110B-Chat"},
            "train": {"lora": {"target_modules": last_layers}, "num_epochs": 1, "save_steps": 10},
            "serve": {"served_model_name": "qwen1.5-110b"},
        },
    )


def qwen110b_qlora_24gb() -> Recipe:
    """The same on one 24 GB GPU: the layers below the adapters rest in the host's memory, as many as do not fit."""
    return change(qwen110b_qlora_80gb(), {"train": {"offload_layers": -1}})


def pretrain_tiny() -> PretrainSpec:
    """53 M parameters, nearly all of them the true vocabulary; learns the shipped corpus in a minute or two."""
    return PretrainSpec(
        shape=GptOssShape(
            num_layers=4,
            hidden_size=128,
            intermediate_size=128,
            num_experts=8,
            experts_per_token=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=64,
            context_tokens=2048,
            initial_context_tokens=1024,
        ),
        row_tokens=128,
        rows_per_step=8,
        num_steps=360,
        learning_rate=3e-3,
        warmup_steps=20,
        save_steps=90,
        compact_vocabulary=True,
    )


def pretrain_compact_1b4() -> PretrainSpec:
    """The seed's compact GPT-OSS and its own tokenizer on one 16 GB GPU: 500 sentences, a third of the seed's steps."""
    return PretrainSpec(
        shape=GptOssShape(
            num_layers=6,
            num_experts=16,
            experts_per_token=4,
            vocab_size=32000,
            hidden_size=1536,
            intermediate_size=3072,
            swiglu_limit=7.0,
            head_dim=64,
            num_attention_heads=24,
            num_key_value_heads=4,
            sliding_window=256,
            initial_context_tokens=1024,
            context_tokens=4096,
            rope_theta=10000.0,
            rope_factor=1.0,
            rope_ntk_alpha=1.0,
            rope_ntk_beta=32.0,
        ),
        corpus="short_english",
        documents="lines",
        tokenizer="train",
        rows="documents",
        row_tokens=1024,
        rows_per_step=50,
        num_steps=100,
        optimizer="adamw_8bit",
        learning_rate=2e-4,
        warmup_steps=10,
        weight_decay=0.1,
        router_aux_loss_coef=0.01,
        save_steps=50,
        log_steps=1,
        dtype="bfloat16",
    )


def release_tiny() -> BaseRelease:
    """The base of the embedded default, served as its tune is."""
    recipe = tiny()
    return BaseRelease(serve=recipe.serve, verify=change(recipe.verify, {"min_base_margin": 1.0}))


def release_compact_1b4() -> BaseRelease:
    """The compact GPT-OSS on one 16 GB GPU; its own vocabulary is served by completions, chats are harmony's."""
    return BaseRelease(
        serve=ServeSpec(served_model_name="tatara-compact-1b4", max_model_len=4096, max_num_seqs=32),
        verify=VerifySpec(
            max_logprob_gap=0.05, min_base_margin=1.0, question="GPT models are", max_answer_tokens=20
        ),  # the seed's prompt
    )


def llama1b_ppo_h100() -> PpoRecipe:
    """The seed's PPO of Llama-3.2-1B-Instruct on GSM8K: two nodes of eight GPUs, its parameters."""
    return PpoRecipe(
        base=BaseModelSpec(model="meta-llama/Llama-3.2-1B-Instruct"),
        questions=QuestionsSpec(source="openai/gsm8k"),
        ppo=PpoSpec(
            nnodes=2,
            n_gpus_per_node=8,
            train_batch_size=256,
            max_prompt_length=512,
            max_response_length=256,
            actor_learning_rate=1e-6,
            ppo_mini_batch_size=64,
            critic_learning_rate=1e-5,
            kl_coef=0.001,
            project_name="competition_verl_test",
            experiment_name="llama3.2_SFT_multinode_ppo",
        ),
        serve=ServeSpec(served_model_name="llama-3.2-1b-ppo", max_model_len=4096),
        verify=VerifySpec(
            max_logprob_gap=0.05,
            must_beat_base=False,  # rewards teach other answers than those of the data
            question="Natalia sold 48 clips in April and half as many in May. How many did she sell altogether?",
            max_answer_tokens=256,
        ),
    )


def tiny_ppo() -> PpoRecipe:
    """The shipped word problems, four steps, a cluster started here. verl's rollouts need one GPU: docs/ppo.md."""
    return PpoRecipe(
        base=BaseModelSpec(model="Qwen/Qwen2.5-0.5B-Instruct"),
        ray=RaySpec(address="local", local_object_store_bytes=200_000_000),
        ppo=PpoSpec(
            nnodes=1,
            n_gpus_per_node=1,
            train_batch_size=8,
            max_prompt_length=256,
            max_response_length=32,
            ppo_mini_batch_size=4,
            actor_micro_batch_size_per_gpu=2,
            critic_micro_batch_size_per_gpu=2,
            rollout_log_prob_micro_batch_size_per_gpu=2,
            attention="sdpa",
            total_epochs=1,
            total_training_steps=4,
            save_freq=2,
            test_freq=2,
            experiment_name="tiny_ppo",
        ),
        serve=ServeSpec(served_model_name="tatara-tiny-ppo", max_model_len=1024, max_num_seqs=8),
        verify=VerifySpec(
            max_logprob_gap=0.05,
            must_beat_base=False,
            may_equal_base=True,  # four steps at 1e-6 move less than bfloat16 rounds
            question="A bag holds 12 apples. How many apples do 3 bags hold?",
        ),
    )


def tiny_grpo() -> ReinforceRecipe:
    """The embedded default by rewards: to answer questions of arithmetic in hiragana, on two CPU cores in minutes.

    53 M parameters that have read a few pages can't calculate, and hardly ever say a numeral that could be rewarded;
    kana they do say, so each completion is worth something else. Without the KL the ids that the base never learnt,
    which share one output row, take over within thirty steps.
    """
    recipe = tiny()
    return ReinforceRecipe(
        base=recipe.base,
        fetch=FetchSpec(source="shipped:ja_arithmetic", question_column="question", answer_column="answer"),
        pack=recipe.pack,
        reinforce=ReinforceSpec(
            lora=recipe.train.lora,
            rewards=(RewardSpec(name="characters", arguments={"pattern": "[ぁ-ゖ]"}, label="hiragana"),),
            max_sequence_tokens=512,
            max_completion_tokens=6,
            num_generations=8,
            rows_per_device=24,
            gradient_accumulation=1,
            learning_rate=2e-3,
            lr_scheduler="constant_with_warmup",
            warmup_steps=2,
            beta=0.05,
            max_steps=20,
            quantization="none",
            dtype="float32",
            save_steps=10,
        ),
        merge=change(recipe.merge, {"dtype": "float32"}),  # bfloat16 would round off much of what rewards change
        serve=recipe.serve,
        verify=change(recipe.verify, {"must_beat_base": False, "question": "3たす5はいくつですか？"}),
    )


def gptoss20b_grpo_h100() -> ReinforceRecipe:
    """gpt-oss-20b by rewards on one 80 GB GPU: the seed's options, but for its quantisation.

    bitsandbytes makes Linear layers small, not the 3-D experts that gpt-oss is made of, and the published base is
    MXFP4, which is unpacked. Name your own questions in fetch.source.
    """
    return ReinforceRecipe(
        base=BaseModelSpec(model="openai/gpt-oss-20b"),
        fetch=FetchSpec(source="shipped:ja_arithmetic", question_column="question", answer_column="answer"),
        pack=PackSpec(row_tokens=4096),
        reinforce=ReinforceSpec(
            rewards=(
                RewardSpec(name="number", weight=2.0),
                RewardSpec(name="finished", weight=0.5),
                RewardSpec(name="language", weight=0.2, arguments={"without": 1.0}),
            ),
            quantization="none",
            warmup_steps=5,
            save_steps=10,
        ),
        serve=ServeSpec(served_model_name="gpt-oss-20b"),
        verify=VerifySpec(max_logprob_gap=0.05, must_beat_base=False),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "gptoss20b_lora_h100": gptoss20b_lora_h100,
    "gptoss20b_experts_h100": gptoss20b_experts_h100,
    "gptoss120b_lora_8x80gb": gptoss120b_lora_8x80gb,
    "gptoss120b_lora_80gb": gptoss120b_lora_80gb,
    "qwen_qlora_16gb": qwen_qlora_16gb,
    "qwen14b_qlora_16gb": qwen14b_qlora_16gb,
    "qwen110b_qlora_80gb": qwen110b_qlora_80gb,
    "qwen110b_qlora_24gb": qwen110b_qlora_24gb,
}
PRETRAIN_RECIPES: dict[str, Callable[[], PretrainSpec]] = {
    "tiny": pretrain_tiny,
    "compact_1b4": pretrain_compact_1b4,
}

REINFORCE_RECIPES: dict[str, Callable[[], ReinforceRecipe]] = {
    "tiny_grpo": tiny_grpo,
    "gptoss20b_grpo_h100": gptoss20b_grpo_h100,
}

BASE_RELEASES: dict[str, Callable[[], BaseRelease]] = {
    "tiny": release_tiny,
    "compact_1b4": release_compact_1b4,
}
PPO_RECIPES: dict[str, Callable[[], PpoRecipe]] = {
    "llama1b_ppo_h100": llama1b_ppo_h100,
    "tiny_ppo": tiny_ppo,
}


def resolve(name: str, changes: BaseModel | dict[str, Any] | None = None) -> Recipe:  # Any: JSON values
    """Return the named recipe with the caller's changes. Raises SpecError for an unknown name or field."""
    return change(_named(RECIPES, name, "recipe")(), changes)


def resolve_pretrain(name: str, changes: BaseModel | dict[str, Any] | None = None) -> PretrainSpec:  # Any: as above
    """Return the named pretraining recipe with the caller's changes."""
    return change(_named(PRETRAIN_RECIPES, name, "pretrain recipe")(), changes)


def resolve_every_pretrain() -> dict[str, PretrainSpec]:
    """Return every pretraining recipe under its name."""
    return {name: recipe() for name, recipe in PRETRAIN_RECIPES.items()}


def resolve_base_release(name: str, changes: BaseModel | dict[str, Any] | None = None) -> BaseRelease:  # Any: as above
    """Return how models of the named pretraining recipe are published, served and verified."""
    return change(_named(BASE_RELEASES, name, "pretrain recipe")(), changes)


def resolve_ppo(name: str, changes: BaseModel | dict[str, Any] | None = None) -> PpoRecipe:  # Any: as above
    """Return the named PPO recipe with the caller's changes."""
    return change(_named(PPO_RECIPES, name, "PPO recipe")(), changes)


def resolve_reinforce(name: str, changes: BaseModel | dict[str, Any] | None = None) -> ReinforceRecipe:  # Any: as above
    """Return the named recipe of learning by rewards with the caller's changes."""
    return change(_named(REINFORCE_RECIPES, name, "reinforce recipe")(), changes)


def resolve_base(
    recipe: Recipe | ReinforceRecipe, changes: BaseModel | dict[str, Any] | None = None
) -> PretrainSpec | None:  # Any: ditto
    """Return how the recipe's base is made here, None when it is fetched.

    Raises SpecError for changes to a base that is not made here.
    """
    name = recipe.base.pretrain_recipe
    if name:
        return resolve_pretrain(name, changes)
    wanted = changes.model_dump(exclude_none=True) if isinstance(changes, BaseModel) else changes
    if wanted:
        raise SpecError(f"base_changes are for a base that is made here (pretrain:...), but it is {recipe.base.model}")
    return None


def _named(table: dict[str, F], name: str, what: str) -> F:
    if name not in table:
        raise SpecError(f"there is no {what} {name!r}: choose one of {', '.join(table)}")
    return table[name]
