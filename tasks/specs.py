"""Every knob that a caller can turn: one frozen Spec per verb, one Recipe that holds them all.

    Recipe = base + fetch + pack + train + merge + publish + serve + verify + evaluate + promote

A Spec says *what* is wanted, never where it runs or with which secret: two equal Specs on equal
inputs name the same artifact (`tasks/artifacts.py`). Units are in the names.

Ring: pure.
"""

import ipaddress
import math
import re
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from tasks.environment import (
    hide_secrets,
    hide_values,
    holds_login,
    holds_secret,
    is_secret_name,
    is_secret_option,
    secret_override,
)
from tasks.errors import SpecError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
_SECRETS_ELSEWHERE = "set it in the environment of the worker, or in a file that only you can read"
_SET_BY_US = frozenset(
    f"--{name}"
    for name in (
        *("job-name", "comment", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "output", "error", "open-mode"),
        *("export", "signal", "requeue", "no-requeue", "time", "partition", "account", "qos", "nodelist", "mem"),
        *("cpus-per-task", "chdir", "array", "parsable", "wait", "wrap", "hold", "input", "test-only", "export-file"),
    )
)


def _read_dashboard(value: str, otherwise: str = "") -> str:
    if not re.fullmatch(r"https?://[^/@\s]+/?", value):
        raise ValueError(
            f"expected the dashboard's URL, such as http://10.0.0.1:8265, without a path or a login{otherwise}; a "
            "token goes into RAY_AUTH_TOKEN. The port of `ray start --address` (6379) is another one"
        )
    return value.rstrip("/")


class Spec(BaseModel):
    """Base of all knobs: frozen, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    later: ClassVar[frozenset[str]] = frozenset()  # fields that came after the first keys were made
    beside: ClassVar[frozenset[str]] = frozenset()  # fields that decide nothing about an artifact's bytes

    def key_values(self) -> dict[str, Any]:  # Any: JSON values
        """Return the part of an artifact's key that the knobs are.

        A `later` field is left out while it has its default, so that what was made before it came is still found.
        """
        neutral = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        values = self.model_dump(mode="json", exclude={*neutral, *self.beside})
        nested = {name: value.key_values() for name in values if isinstance(value := getattr(self, name), Spec)}
        return {**values, **nested}


class BaseModelSpec(Spec):
    """The open model that is tuned: a Hub id, a local folder, or a `pretrain` recipe."""

    model: str = Field(description="Hub id (openai/gpt-oss-20b), folder, or pretrain:<recipe>.")
    revision: str = Field(default="main", description="Branch, tag or commit of a Hub model.")

    @field_validator("model")
    @classmethod
    def _names_something(cls, value: str) -> str:
        if not value.removeprefix("pretrain:").strip():
            raise ValueError("it names no model: give a Hub id, a folder, or pretrain:<recipe>")
        return value

    @property
    def pretrain_recipe(self) -> str | None:
        """The recipe behind `pretrain:<recipe>`, else None."""
        head, _, name = self.model.partition(":")
        return name if head == "pretrain" and name else None


class FetchSpec(Spec):
    """Where conversations or texts come from."""

    source: str = Field(
        description="'shipped', 'shipped:ja_arithmetic', a Hub data set id, or a .jsonl/.csv/.parquet file."
    )
    validation_source: str = Field(
        default="", description="File of the validation rows; empty: split off or Hub split."
    )
    revision: str = Field(default="main", description="Branch, tag or commit of a Hub data set.")
    config: str = Field(default="", description="Configuration (subset) of a Hub data set.")
    split: str = Field(default="train", description="Split of a Hub data set to train on.")
    validation_split: str = Field(default="", description="Split of a Hub data set to validate on.")
    messages_column: str = Field(default="messages", description="Column with a list of {role, content}.")
    question_column: str = Field(default="", description="With answer_column: single-turn chats from two columns.")
    answer_column: str = Field(default="", description="Column of the answer; see question_column.")
    text_column: str = Field(default="", description="Plain text instead of chats (language modelling).")
    max_rows: int = Field(default=0, ge=0, description="Use only the first rows; 0: all.")
    validation_pct: float = Field(default=5.0, ge=0, lt=100, description="Share split off when no validation is named.")
    max_rejected_pct: float = Field(default=0.0, ge=0, le=100, description="More bad rows than this: an error.")

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        if bool(self.question_column) != bool(self.answer_column):
            raise ValueError("question_column and answer_column come together: set both or neither")
        if self.text_column and self.question_column:
            raise ValueError("text_column excludes question_column/answer_column: choose chats or plain text")
        return self


class PackSpec(Spec):
    """How conversations become rows of tokens."""

    row_tokens: Positive = Field(default=4096, description="Tokens in one packed row.")
    packing: bool = Field(default=True, description="Several documents in one row (best fit), never seeing each other.")
    loss_on: Literal["assistant", "all"] = Field(default="assistant", description="Which tokens are learnt.")
    too_long: Literal["error", "drop"] = Field(default="error", description="What to do with a row over row_tokens.")
    system_prompt: str = Field(default="", description="Put before each chat that has no system message.")
    prompt_date: str = Field(
        default="2025-08-05",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="Date in the gpt-oss system message; pinned, or tokens would change overnight.",
    )


class LoraSpec(Spec):
    """The adapter: ranks, and what it is put on."""

    rank: Positive = 8
    alpha: Positive = 16
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Must be 0 with target_parameters (PEFT refuses it).")
    target_modules: tuple[str, ...] = Field(default=(), description="Linear modules, matched by name ending.")
    target_parameters: tuple[str, ...] = Field(default=(), description="3-D expert tensors, matched by name ending.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @model_validator(mode="after")
    def _hits_something(self) -> Self:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("an adapter needs target_modules or target_parameters: both are empty")
        if self.target_parameters and self.dropout:
            raise ValueError(f"dropout={self.dropout} can't be used with target_parameters: set it to 0")
        return self


class LaunchSpec(Spec):
    """Where a training's processes run. It decides nothing about the adapter: same run, other place."""

    launcher: Literal["local", "torchrun", "slurm", "ray"] = Field(
        default="local",
        description="local: this machine; torchrun: this one and others, where its join.sh is started by hand; "
        "slurm: a job that is submitted with sbatch and followed; ray: a job of a Ray cluster, followed likewise.",
    )
    nodes: Positive = Field(default=1, description="Machines.")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs of a node, a process each; 0: CPU nodes.")
    processes_per_node: int = Field(default=0, ge=0, description="Processes of a node; 0: one a GPU, without GPUs one.")
    gpu_type: str = Field(
        default="", pattern=r"^[\w.-]*$", description="GPU type as SLURM or Ray names it: h100, H100."
    )
    gpu_memory_gb: float = Field(
        default=0.0, ge=0, description="Memory of one such GPU in GB (80, 141): the step is cut to fit it."
    )
    python: str = Field(
        default="", description="Python on the nodes, with Tatara's packages; empty: the path of this one."
    )
    command_prefix: tuple[str, ...] = Field(
        default=(), description="Words before that Python, such as apptainer, exec, --nv, /images/tatara.sif."
    )
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines before the start, such as module load hpcx; SLURM: on the first node."
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Variables of all processes, such as NCCL_SOCKET_IFNAME; no secrets."
    )
    address: str = Field(
        default="", pattern=r"^[\w.:-]*$", description="torchrun: name or address of this machine for the others."
    )
    master_port: int = Field(
        default=0, ge=0, le=65535, description="Port of the rendezvous on the first node; 0: from the job's number."
    )
    max_restarts: int = Field(
        default=0, ge=0, description="How often torchrun starts all ranks again inside a job after one died."
    )
    ray_address: str = Field(
        default="", description="URL of a Ray cluster's dashboard (http://head:8265); empty: RAY_ADDRESS."
    )
    ray_python: str = Field(default="python3", description="Python with ray on the head of that cluster.")
    reserve_timeout_s: float = Field(
        default=3600.0, gt=0, description="How long a Ray job waits until its nodes and GPUs are free."
    )
    partition: str = Field(default="", description="SLURM partition, or several with commas; empty: the default.")
    account: str = Field(default="", description="SLURM account that is charged.")
    qos: str = Field(default="", description="SLURM quality of service.")
    nodelist: str = Field(default="", description="Nodes that must be among those of the job: gpu[02-03].")
    time_limit: str = Field(
        default="",
        pattern=r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?)?$",
        description="Longest run of a job, such as 6-00:00:00; near its end it writes a checkpoint and is requeued.",
    )
    cpus_per_task: int = Field(
        default=0, ge=0, description="CPUs of a node's launcher; 0: SLURM's default, of Ray one."
    )
    memory: str = Field(
        default="", pattern=r"^(\d+[KMGT]?)?$", description="Memory of a node, such as 900G; 0: all of it."
    )
    requeue: bool = Field(
        default=True, description="Go on in the queue after preemption, a lost node or the end of the time limit."
    )
    sbatch_options: tuple[str, ...] = Field(
        default=(), description="Further options of sbatch, such as --exclusive or --constraint=ib."
    )
    stop_notice_s: Positive = Field(
        default=180, description="How long before the end of time_limit the last checkpoint is begun."
    )
    poll_s: float = Field(default=15.0, gt=0, description="Time between two questions to SLURM or Ray.")
    shared_timeout_s: float = Field(
        default=300.0, gt=0, description="Every node has to show within this that it sees the job's folder."
    )

    @property
    def node_processes(self) -> int:
        """Processes of one node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def num_processes(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.node_processes

    @property
    def is_elsewhere(self) -> bool:
        """Whether it runs on machines that somebody else hands out, as a job."""
        return self.launcher in ("slurm", "ray")

    @field_validator("ray_address")
    @classmethod
    def _is_dashboard(cls, value: str) -> str:
        return _read_dashboard(value) if value else value

    @field_validator("partition", "account", "qos", "nodelist")
    @classmethod
    def _is_a_word(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.,\[\]@+-]*", value, re.ASCII):
            raise ValueError("it would break out of its #SBATCH line: expected letters, digits and . , [ ] @ + - _")
        return value

    @field_validator("sbatch_options")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.partition("=")[0]
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[\w.,:\[\]@+*/&|!=-]+)?", option, re.ASCII):
                raise ValueError(f"{option!r} is not --name or --name=value, its value without blanks and quotes")
            if name in _SET_BY_US:
                raise ValueError(f"{name} is set by Tatara: leave it out; partition, nodes and others have fields")
        return value

    @field_validator("setup", "command_prefix")
    @classmethod
    def _are_lines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if not line.isprintable():
                raise ValueError(f"{line!r} holds a line break or another control character: give each line by itself")
            options = (word.replace("-", "_") for word in re.findall(r"--([\w-]+)", line))
            named = [*re.findall(r"(\w+)=", line), *options]
            if secret := next((name for name in named if is_secret_name(name)), ""):
                raise ValueError(
                    f"it sets {secret}, which would stand in recipes and job scripts: {_SECRETS_ELSEWHERE}"
                )
            if holds_login(line):
                raise ValueError(
                    f"it holds a URL with a login, which would stand in recipes and job scripts: {_SECRETS_ELSEWHERE}"
                )
        return value

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable: expected letters, digits and _")
            if holds_secret(name, text):
                raise ValueError(f"{name} would stand in recipes and job scripts: {_SECRETS_ELSEWHERE}")
            if not text.isprintable():
                raise ValueError(f"the value of {name} holds a line break or another control character: leave it out")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.launcher == "local" and self.num_processes > 1:
            raise ValueError(
                "launcher='local' trains on this machine alone, as TrainSpec.num_processes says: leave nodes, "
                "gpus_per_node and processes_per_node out, or choose launcher='slurm', 'ray' or 'torchrun'"
            )
        if self.gpus_per_node and self.node_processes != self.gpus_per_node:
            raise ValueError(
                f"processes_per_node={self.processes_per_node} but gpus_per_node={self.gpus_per_node}: each process "
                "trains on a GPU of its own, leave processes_per_node out"
            )
        if self.is_elsewhere and self.gpus_per_node and not self.gpu_memory_gb:
            raise ValueError(
                "gpu_memory_gb is 0: say the memory of one GPU of the nodes, so that the step is cut to fit"
            )
        if self.launcher == "torchrun" and not self.address:
            raise ValueError("launcher='torchrun' needs address: the name by which the other machines reach this one")
        return self


class TrainSpec(Spec):
    """One LoRA run by TRL's SFTTrainer."""

    lora: LoraSpec
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    num_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1, description="Stop after so many optimizer steps; -1: by epochs.")
    rows_per_device: Positive = Field(default=1, description="Packed rows in one forward pass.")
    gradient_accumulation: Positive = 1
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["none", "nf4", "int8"] = Field(default="none", description="nf4: QLoRA, int8: LLM.int8().")
    attention: Literal["auto", "eager", "flash", "flex_attention", "sdpa"] = "auto"
    kernels: Literal["auto", "fused", "stock"] = Field(
        default="auto",
        description="fused: our expert LoRA, norms and head below gpt-oss; stock: transformers and PEFT.",
    )
    checkpointing: Literal["auto", "none", "offload", "selective", "full"] = Field(
        default="auto",
        description="What is not kept for the backward pass, but sent to the host's memory and back (offload: the "
        "experts' gate of every second layer) or made again (selective: the gate, full: each layer); auto: as little "
        "as fits the GPU.",
    )
    fit_micro_batch: bool = Field(
        default=True,
        description="On a GPU: choose the rows of a pass that fit; rows_per_device * gradient_accumulation stays.",
    )
    save_steps: Positive = 50
    keep_checkpoints: int = Field(
        default=2,
        ge=2,
        description="Newest whole checkpoints that are kept: 2 or more, to have one before a damaged one.",
    )
    eval_steps: int = Field(default=0, ge=0, description="Evaluate each so many steps; 0: only before and after.")
    log_steps: Positive = 1
    num_processes: Positive = Field(default=1, description="Processes (GPUs) of this machine, started by torchrun.")
    parallel: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="ddp: the whole base on each GPU; fsdp2: each holds a part, and layers are gathered."
    )
    offload_layers: int = Field(
        default=0,
        ge=-1,
        description="So many of the lowest layers, all below the lowest adapter, rest in the host's memory and pass "
        "through the GPU one by one; -1: as many as the fastest plan that fits has.",
    )
    stall_timeout_s: float = Field(default=1800.0, gt=0, description="No progress for so long: the run hangs.")
    heartbeat_timeout_s: float = Field(default=300.0, gt=0, description="A silent heartbeat for so long: it hangs.")
    stop_grace_s: float = Field(
        default=25.0, gt=0, description="Time for a last checkpoint when told to stop; Prefect's worker waits 30 s."
    )
    keep_best: bool = Field(default=False, description="Keep the weights of the lowest validation loss, not the last.")
    early_stopping_patience: int = Field(
        default=0, ge=0, description="Stop after so many evaluations in a row without a new best; 0: never."
    )
    early_stopping_min_delta: float = Field(default=0.0, ge=0, description="A new best is lower by more than this.")
    explosion_factor: float = Field(
        default=3.0, ge=0, description="A loss above this times the running median explodes; 0: never looked at."
    )
    explosion_steps: Positive = Field(default=5, description="Exploding losses in a row that end the run.")
    deterministic: bool = Field(default=False, description="Only operations whose result is the same each time.")
    report_to: Literal["none", "wandb"] = Field(
        default="none", description="wandb: online with WANDB_API_KEY, else an offline run below TATARA_HOME/wandb."
    )
    launch: LaunchSpec = Field(
        default=LaunchSpec(), description="Where the processes run: this machine, several, or a SLURM cluster."
    )

    later: ClassVar[frozenset[str]] = frozenset(
        {"keep_best", "early_stopping_patience", "early_stopping_min_delta", "deterministic"}
    )
    beside: ClassVar[frozenset[str]] = frozenset(
        {
            "heartbeat_timeout_s",
            "stop_grace_s",
            "explosion_factor",
            "explosion_steps",
            "report_to",
            "parallel",
            "offload_layers",
            "launch",
        }
    )

    @model_validator(mode="after")
    def _is_evaluated(self) -> Self:
        if (self.keep_best or self.early_stopping_patience) and not self.eval_steps:
            raise ValueError("keep_best and early_stopping_patience need evaluations: set eval_steps to 1 or more")
        return self

    @model_validator(mode="after")
    def _can_be_shared_out(self) -> Self:
        if self.parallel == "ddp":
            return self
        ddp = "or choose parallel='ddp'"
        if self.num_processes == 1:
            raise ValueError(f"parallel='fsdp2' shares the base out, but num_processes is 1: set 2 or more, {ddp}")
        if self.quantization != "none":
            raise ValueError(
                f"parallel='fsdp2' can't share out a base in {self.quantization}: set quantization='none', {ddp}"
            )
        return self

    @model_validator(mode="after")
    def _can_rest_on_the_host(self) -> Self:
        if not self.offload_layers:
            return self
        if self.quantization == "int8":
            raise ValueError("offload_layers can't move a base in int8: set quantization to nf4 or none")
        count = self.num_processes if self.launch.launcher == "local" else self.launch.num_processes
        if count > 1:
            raise ValueError(
                f"offload_layers is for one process, but there are {count}: they share a base out by parallel='fsdp2'"
            )
        return self

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("max_steps is 0: nothing would be trained; use -1 for whole epochs")
        return value


class RewardSpec(Spec):
    """One reward: a name of tasks/reinforce/rewards.py, or a user's own function, and what it counts."""

    name: str = Field(description="A reward's name, or package.module:function of your own.")
    weight: float = Field(default=1.0, description="What it counts in the sum; a negative one punishes.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Its settings.")  # Any: JSON values
    label: str = Field(default="", pattern=r"^\w*$", description="Its name in tables; empty: the function's.")

    @field_validator("arguments")
    @classmethod
    def _hold_no_secret(cls, value: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
        variable = value.get("api_key_variable", "")
        if not re.fullmatch(r"([A-Za-z_]\w*)?", str(variable), re.ASCII):
            raise ValueError("api_key_variable is the name of an environment variable, and never the key itself")
        for name, said in value.items():
            if name != "api_key_variable" and isinstance(said, str) and holds_secret(name, said):
                raise ValueError(
                    f"{name} looks like a credential, and recipes are stored and published: put it into a variable of "
                    "the worker's environment and name that (api_key_variable)"
                )
        return value

    @property
    def column(self) -> str:
        """What it is called in metrics.csv and generations.csv."""
        return self.label or self.name.rpartition(":")[2].rpartition(".")[2]


_EXPERTS_OF_THREE_LAYERS = LoraSpec(
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    target_parameters=tuple(
        f"{layer}.mlp.experts.{name}" for layer in (7, 15, 23) for name in ("gate_up_proj", "down_proj")
    ),
)


class ReinforceSpec(Spec):
    """One GRPO run by TRL's GRPOTrainer. What stands as default is the seed's; docs/reinforcement.md has the table."""

    lora: LoraSpec = _EXPERTS_OF_THREE_LAYERS
    rewards: tuple[RewardSpec, ...] = Field(
        default=(RewardSpec(name="exact"),), min_length=1, description="What an answer is worth: a weighted sum."
    )
    max_sequence_tokens: Positive = Field(default=5000, description="Tokens of a prompt and its completion together.")
    max_completion_tokens: int = Field(default=0, ge=0, description="0: what the longest prompt leaves.")
    num_generations: int = Field(default=4, ge=2, description="Completions of one prompt, compared with each other.")
    rows_per_device: Positive = Field(default=1, description="Completions in one learning pass.")
    gradient_accumulation: Positive = Field(default=8, description="Passes of a step; a step learns both multiplied.")
    learning_rate: float = Field(default=5e-5, gt=0)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    num_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1, description="Stop after so many optimizer steps; -1: by epochs.")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.0, ge=0, description="Weight of the KL divergence from the start; 0: not asked.")
    num_iterations: Positive = Field(default=1, description="Optimizer steps on the same completions.")
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="The ratio to the old policy is clipped beyond it.")
    epsilon_high: float = Field(default=0.0, ge=0, description="Upper clip of its own (DAPO: 0.28); 0: epsilon.")
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group", description="By what standard deviation advantages are divided."
    )
    mask_truncated: bool = Field(default=False, description="Do not learn from completions that were cut off.")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="Sample from so many tokens only; 0: from all.")
    rollouts: Literal["auto", "transformers", "continuous", "vllm"] = Field(
        default="auto",
        description="What generates. auto: a vLLM in the trainer's process where a GPU has room for it, else "
        "transformers: its continuous batching, or its generate for what that can't do.",
    )
    vllm_memory_share: float = Field(
        default=0.0, ge=0, lt=1, description="Part of the GPU that such a vLLM takes; 0: the weights and a tenth."
    )
    min_adapter_share: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="Rollouts that show less of the adapter's change, beyond chance, end the run; 0: only measured.",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(default="nf4", description="nf4: QLoRA, int8: LLM.int8().")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto", description="gpt-oss has sinks, which of these only eager has; others: sdpa."
    )
    kernels: Literal["auto", "stock"] = Field(
        default="auto", description="auto: our expert LoRA and norms below gpt-oss; stock: transformers and PEFT."
    )
    device_map: Literal["auto", "cpu"] = Field(default="auto", description="auto: a GPU where there is one.")
    torch_compile: bool = Field(default=False, description="Compile the model's forward pass, as Trainer does.")
    checkpointing: Literal["auto", "none", "full"] = Field(
        default="auto", description="Recompute layers in the backward pass; auto: on a GPU."
    )
    seed: int = Field(default=0, ge=0)
    save_steps: Positive = 50
    keep_checkpoints: int = Field(default=2, ge=2, description="Newest whole checkpoints that are kept.")
    metrics_csv: str = Field(default="metrics.csv", description="One line a step, in the artifact's folder.")
    generations_csv: str = Field(default="generations.csv", description="One line a completion.")
    stop_at_reward: float | None = Field(
        default=None, description="End in order when the mean reward of the last 10 steps reaches it."
    )
    max_kl: float = Field(default=0.0, ge=0, description="A KL above it ends the run as failed; 0: never.")
    stall_timeout_s: float = Field(default=1800.0, gt=0, description="No progress for so long: the run hangs.")
    heartbeat_timeout_s: float = Field(default=300.0, gt=0, description="A silent heartbeat for so long: it hangs.")
    stop_grace_s: float = Field(default=25.0, gt=0, description="Time for a last checkpoint when told to stop.")

    beside: ClassVar[frozenset[str]] = frozenset(
        {"min_adapter_share", "max_kl", "stall_timeout_s", "heartbeat_timeout_s", "stop_grace_s"}
    )

    @property
    def rows_per_step(self) -> int:
        """Completions that one optimizer step learns."""
        return self.rows_per_device * self.gradient_accumulation

    @property
    def cuts_tail(self) -> bool:
        """Say whether unlikely tokens are never sampled."""
        return self.top_p < 1 or self.top_k > 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rows_per_step % self.num_generations:
            raise ValueError(
                f"rows_per_device={self.rows_per_device} times gradient_accumulation={self.gradient_accumulation} is "
                f"{self.rows_per_step} completions a step, expected a multiple of num_generations="
                f"{self.num_generations}: a prompt's completions are compared within a step"
            )
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps={self.save_steps} must be a multiple of num_iterations={self.num_iterations}: completions "
                "are used for so many steps and are in no checkpoint, so a run that goes on between would be another"
            )
        if self.max_completion_tokens >= self.max_sequence_tokens:
            raise ValueError(
                f"max_completion_tokens={self.max_completion_tokens} leaves no room for a prompt in "
                f"max_sequence_tokens={self.max_sequence_tokens}: lower it, or raise the other"
            )
        if self.max_kl and not self.beta:
            raise ValueError(f"max_kl={self.max_kl:g} needs the KL to be measured: set beta above 0")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: nothing would be learnt; use -1 for whole epochs")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        columns = [reward.column for reward in self.rewards]
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]!r}: give one of them a label")
        names = (self.metrics_csv, self.generations_csv)
        if names[0] == names[1] or not all(re.fullmatch(r"[\w-]+\.csv", name) for name in names):
            raise ValueError(
                f"metrics_csv and generations_csv are {names}: expected two names of .csv files, no folders"
            )
        return self


class GptOssShape(Spec):
    """Architecture of a GptOssForCausalLM that is trained from scratch."""

    num_layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_experts: Positive
    experts_per_token: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    vocab_size: Positive = 201088
    sliding_window: Positive = 128
    context_tokens: Positive = 2048
    initial_context_tokens: Positive = 1024
    rope_theta: float = 150000.0
    rope_factor: float = Field(
        default=2.0, ge=1.0, description="YaRN: context_tokens / initial_context_tokens; 1: nothing is stretched."
    )
    rope_ntk_alpha: float = Field(default=1.0, gt=0, description="YaRN's beta_slow; decides nothing at rope_factor 1.")
    rope_ntk_beta: float = Field(default=32.0, gt=0, description="YaRN's beta_fast; decides nothing at rope_factor 1.")
    tie_embeddings: bool = False
    swiglu_limit: float = 7.0

    later: ClassVar[frozenset[str]] = frozenset({"rope_ntk_alpha", "rope_ntk_beta"})

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        stretched = self.initial_context_tokens * self.rope_factor
        if self.rope_factor > 1 and round(stretched) != self.context_tokens:
            raise ValueError(
                f"initial_context_tokens={self.initial_context_tokens} times rope_factor={self.rope_factor:g} is "
                f"{stretched:g}, expected context_tokens={self.context_tokens}"
            )
        return self


class PretrainSpec(Spec):
    """A GptOssForCausalLM from its config, trained from scratch on plain text."""

    shape: GptOssShape
    corpus: str = Field(
        default="shipped",
        description="'shipped', 'short_english', a file or folder of .txt/.jsonl/.parquet, or a Hub data set id.",
    )
    corpus_revision: str = Field(default="main", description="Branch, tag or commit of a Hub data set.")
    corpus_config: str = Field(default="", description="Configuration (subset) of a Hub data set.")
    corpus_split: str = Field(default="train", description="Split of a Hub data set.")
    text_column: str = Field(default="text", description="Column of a table (.jsonl, .parquet, Hub) with the text.")
    documents: Literal["files", "lines"] = Field(
        default="files", description="What is a document of a text file: all of it, or each line that is not blank."
    )
    streaming: bool = Field(
        default=False, description="Read a Hub data set only as far as num_steps needs; nothing else is downloaded."
    )
    tokenizer: str = Field(
        default="gpt-oss",
        description="'gpt-oss', 'train' (a BPE of shape.vocab_size ids from the corpus), a folder or a Hub id.",
    )
    rows: Literal["windows", "documents"] = Field(
        default="windows",
        description="windows: row_tokens at random places of the corpus; documents: whole ones, cut at row_tokens, "
        "packed without padding, in a new order each epoch, none seeing another.",
    )
    row_tokens: int = Field(default=256, ge=2)
    rows_per_step: Positive = 4
    rows_per_device: int = Field(default=0, ge=0, description="Rows of one pass; 0: rows_per_step / num_processes.")
    num_steps: Positive = 200
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        default="adamw",
        description="adamw: moments in float32; adamw_8bit: bitsandbytes, two bytes a parameter; adafactor: few.",
    )
    learning_rate: float = Field(default=3e-3, gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    router_aux_loss_coef: float = Field(
        default=0.0, ge=0, description="Weight of the load-balancing loss (Switch, GShard), as in GptOssConfig."
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass makes again: nothing, the gate's argument of the experts, whole layers.",
    )
    kernels: Literal["auto", "fused", "stock"] = Field(
        default="auto", description="fused: our attention, experts, norms and head; stock: transformers'."
    )
    save_steps: Positive = 100
    log_steps: int = Field(default=0, ge=0, description="Log each so many steps; 0: forty times in the run.")
    validation_pct: float = Field(
        default=0.0, ge=0, lt=100, description="Share of the corpus, its end, that is never learnt; its loss is told."
    )
    eval_steps: int = Field(default=0, ge=0, description="Tell the held-out loss each so many steps; 0: at the end.")
    seed: int = Field(default=0, ge=0)
    compact_vocabulary: bool = Field(
        default=False, description="Train only the corpus' own ids; all others share one output row."
    )
    dtype: Literal["bfloat16", "float32"] = "float32"
    num_processes: Positive = Field(default=1, description="Processes (GPUs) of this machine, started by torchrun.")
    parallel: Literal["ddp", "fsdp2"] = Field(
        default="ddp",
        description="ddp: the whole model on each GPU; fsdp2: each holds a part, and layers are gathered.",
    )

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "corpus_revision", "corpus_config", "corpus_split", "text_column", "documents", "streaming", "tokenizer",
            "rows", "optimizer", "lr_scheduler", "max_grad_norm", "router_aux_loss_coef", "kernels", "validation_pct",
        }
    )  # fmt: skip
    # A step's rows are the same however they are shared out: a run may go on with another number of GPUs.
    beside: ClassVar[frozenset[str]] = frozenset(
        {"log_steps", "eval_steps", "parallel", "num_processes", "rows_per_device", "checkpointing"}
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.row_tokens > self.shape.context_tokens:
            raise ValueError(f"row_tokens={self.row_tokens} exceeds shape.context_tokens={self.shape.context_tokens}")
        if self.compact_vocabulary and self.shape.tie_embeddings:
            raise ValueError("compact_vocabulary needs tie_embeddings=false: the rest share an output row only")
        if self.compact_vocabulary and self.validation_pct:
            raise ValueError("compact_vocabulary has a loss of its own and holds nothing out: set validation_pct=0")
        if self.eval_steps and not self.validation_pct:
            raise ValueError(f"eval_steps={self.eval_steps} but nothing is held out: set validation_pct above 0")
        if self.compact_vocabulary and (self.rows, self.parallel, self.router_aux_loss_coef) != ("windows", "ddp", 0):
            raise ValueError(
                f"compact_vocabulary=true has a loss of its own, on windows, without balance and not shared out, but "
                f"rows={self.rows!r}, router_aux_loss_coef={self.router_aux_loss_coef:g}, parallel={self.parallel!r}: "
                "set compact_vocabulary=false"
            )
        if self.checkpointing == "selective" and (self.compact_vocabulary or self.kernels == "stock"):
            raise ValueError("checkpointing='selective' is of the fused experts only: set 'full', or kernels='auto'")
        rows = self.num_processes * (self.rows_per_device or 1)
        if self.rows_per_step % rows:
            raise ValueError(
                f"rows_per_step={self.rows_per_step} must be a multiple of num_processes={self.num_processes} times "
                f"rows_per_device={self.rows_per_device or 1}"
            )
        if self.parallel == "fsdp2" and self.optimizer != "adamw":
            raise ValueError(f"parallel='fsdp2' can't share out {self.optimizer}: set optimizer='adamw'")
        return self


class MergeSpec(Spec):
    """How the adapter is added to its base."""

    later: ClassVar[frozenset[str]] = frozenset({"experts"})

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    experts: Literal["plain", "mxfp4"] = Field(
        default="plain", description="Experts in dtype, or as MXFP4 blocks again (a quarter of the size, rounded)."
    )
    shard_bytes: int = Field(default=10_000_000_000, ge=1_000_000, description="Largest shard (10 GB, as in the seed).")


class PublishSpec(Spec):
    """Where the model goes, and as what. Without a repo it stays in a local folder of Hub layout."""

    repo_id: str = Field(default="", description="owner/name on the Hub; empty: HF_REPO_NAME, else local only.")
    private: bool = True
    revision: str = Field(default="main", description="Branch to publish to, or refs/pr/N of an open pull request.")
    ignore_patterns: tuple[str, ...] = ("*.tmp",)
    what: Literal["merged", "adapter", "both"] = Field(
        default="merged", description="both: the merged model, and the adapter in the folder adapter/."
    )
    tag: str = Field(default="", description="Tag that is put on the commit; one that holds something else is refused.")
    create_pr: bool = Field(default=False, description="Open a pull request instead of writing to main.")
    license: str = Field(default="", description="Licence id of the model (apache-2.0); empty: its base's.")
    data_license: str = Field(default="", description="Licence of the data; empty: what its own card says.")

    later: ClassVar[frozenset[str]] = frozenset({"what", "tag", "create_pr", "license", "data_license"})

    @field_validator("repo_id")
    @classmethod
    def _is_repo_id(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError(f"repo_id {value!r} is not owner/name")
        return value

    @field_validator("revision", "tag")
    @classmethod
    def _is_ref(cls, value: str) -> str:
        if re.fullmatch(r"[0-9a-f]{40}", value):
            raise ValueError("a commit can't be written to: name a branch, and a tag if the result is to have a name")
        if not re.fullmatch(r"refs/pr/\d+|(?!refs/)[\w.-]+(/[\w.-]+)*", value or "main"):
            raise ValueError("expected a branch or tag name such as main or v1.0, or refs/pr/3")
        return value

    @field_validator("license", "data_license")
    @classmethod
    def _is_license_id(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.+ -]*", value):
            raise ValueError("expected a licence id such as apache-2.0, cc-by-4.0 or other")
        return value

    @model_validator(mode="after")
    def _goes_to_one_place(self) -> Self:
        if not self.revision:
            raise ValueError("revision is empty: name a branch, such as main")
        if self.create_pr and (self.revision != "main" or self.tag):
            raise ValueError("create_pr opens a pull request against main: leave revision at main and tag empty")
        return self


def is_address(host: str) -> bool:
    """Say whether a service can be told to bind `host`: an IP address or localhost.

    >>> is_address("::1"), is_address("0.0.0.0"), is_address("my-laptop")
    (True, True, False)
    """
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class ServeSpec(Spec):
    """vLLM and the gateway in front of it."""

    host: str = Field(default="127.0.0.1", description="Address to bind; loopback unless told otherwise.")
    vllm_port: int = Field(default=8000, ge=1, le=65535)
    gateway_port: int = Field(default=8001, ge=1, le=65535)
    second_port: int = Field(
        default=0, ge=0, le=65535, description="Port of a new vLLM beside the old one; 0: two or three above vllm_port."
    )
    served_model_name: str = "gpt-oss-20b"
    max_model_len: Positive = 8192
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_num_seqs: Positive = 64
    cpu_kv_cache_bytes: Positive = 256 << 20
    start_timeout_s: float = Field(default=1200.0, gt=0)
    extra_args: tuple[str, ...] = ()

    @property
    def port_beside(self) -> int:
        """Where a promotion starts the new vLLM while the old one serves."""
        if self.second_port:
            return self.second_port
        above = self.vllm_port + (2 if self.vllm_port < 65500 else -20)
        return above if above != self.gateway_port else above + 1

    @field_validator("host")
    @classmethod
    def _is_bindable(cls, value: str) -> str:
        if not is_address(value):
            raise ValueError("expected an IP address of this machine, such as 127.0.0.1 or 0.0.0.0")
        return value

    @field_validator("extra_args")
    @classmethod
    def _holds_no_key(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(is_secret_option(word) for word in value):
            raise ValueError(
                "a key in extra_args would stand in recipe.json, in manifests and in the list of processes: set "
                "VLLM_API_KEY (or HF_TOKEN) in the environment of the worker instead"
            )
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.vllm_port == self.gateway_port:
            raise ValueError(f"vllm_port and gateway_port are both {self.vllm_port}: choose two ports")
        if self.second_port in {self.vllm_port, self.gateway_port}:
            raise ValueError(f"second_port is {self.second_port}, as is another port: choose three ports")
        return self


class VerifySpec(Spec):
    """What the served model has to prove."""

    num_answers: Positive = Field(default=16, description="Validation answers whose log-probability is compared.")
    max_logprob_gap: float = Field(
        default=0.02, gt=0, description="Largest |served - merged| mean log-probability, nats per token."
    )
    max_token_gap_share: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="Largest mean |served - merged| token by token, as a share of |merged - base|; in float32 a fifth "
        "of it counts, in float16 a half.",
    )
    min_base_margin: float = Field(
        default=0.05, gt=0, description="Served must beat the base by at least this, nats per token."
    )
    must_beat_base: bool = Field(
        default=True,
        description="Served must beat the base on the validation answers; a reward may teach other answers than those.",
    )
    may_equal_base: bool = Field(
        default=False,
        description="Of a model that was trained with rewards: let one pass that was moved too little to be told from "
        "its base by log-probabilities; the report says so.",
    )
    max_gain_mismatch: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="Largest difference of served minus base from what the trainer's validation loss fell by, as a "
        "share of that; three standard errors are added when only a part of the answers is scored.",
    )
    num_greedy_prompts: int = Field(default=2, ge=0, description="Prompts whose greedy answers are compared.")
    greedy_tokens: Positive = Field(default=16, description="Tokens of each greedy answer.")
    may_break_format: bool = Field(
        default=False,
        description="Let a model pass whose answer holds markers of the chat format, as those of a toy may: it is "
        "said in the report only.",
    )
    question: str = Field(
        default="たたら製鉄とは何ですか？", description="Asked through the gateway; shown in the report."
    )
    max_answer_tokens: Positive = 96
    request_timeout_s: float = Field(default=120.0, gt=0)
    probe_texts: tuple[str, ...] = Field(
        default=(),
        description="Of a model that was trained here as a whole: texts to score; empty: parts of its corpus, or its "
        "test questions.",
    )


class EvaluateSpec(Spec):
    """With what a candidate, its base and the incumbent are measured, and the rule by which a candidate is promoted."""

    questions: str = Field(
        default="shipped", description="'shipped', or a folder with questions.jsonl and safety.jsonl (data/evaluation)."
    )
    num_documents: Positive = Field(default=256, description="Validation answers whose loss is measured, the first.")
    max_answer_tokens: Positive = Field(default=48, description="Longest generated answer; what comes later is cut.")
    plugins: tuple[str, ...] = Field(default=(), description="Tasks of other tools, such as lm_eval:hellaswag.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where model files are scored; auto: a GPU with room for them, else the CPU."
    )
    request_timeout_s: float = Field(default=300.0, gt=0)
    min_base_margin: float = Field(
        default=0.02, ge=0, description="The validation loss must be lower than the base's by this, nats per token."
    )
    min_incumbent_margin: float = Field(
        default=0.0, ge=0, description="... and than the incumbent's by this, when it has to be better."
    )
    against_incumbent: Literal["better", "not_worse"] = Field(
        default="better", description="better: a lower loss beyond chance; not_worse: no higher loss beyond chance."
    )
    max_accuracy_drop: Share = Field(
        default=0.03, description="A larger share of questions lost, beyond chance, fails; each way of scoring."
    )
    min_safety_score: Share = Field(default=0.7, description="Least share of safety questions, each way of scoring.")
    max_safety_drop: Share = Field(
        default=0.06, description="A larger share of safety questions lost fails, by chance or not."
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="Chance at which a difference counts as one.")

    beside: ClassVar[frozenset[str]] = frozenset(
        {
            *("questions", "device", "request_timeout_s", "min_base_margin", "min_incumbent_margin"),
            *("against_incumbent", "max_accuracy_drop", "min_safety_score", "max_safety_drop", "alpha"),
        }
    )  # the questions' digest is in the key; the rule is the decision's

    @field_validator("plugins")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for plugin in value:
            if not re.fullmatch(r"lm_eval:[\w.-]+", plugin):
                raise ValueError(f"{plugin!r} is not lm_eval:<task>")
        return value


class PromoteSpec(Spec):
    """How a published model takes over from the one that serves."""

    strategy: Literal["auto", "blue_green", "replace"] = Field(
        default="auto", description="blue_green starts it beside the old one; auto: where memory holds both."
    )
    canary_share: float = Field(default=0.1, ge=0, lt=1, description="Share of requests at first; 0: all at once.")
    canary_requests: Positive = Field(default=100, description="Requests after which the new model is judged.")
    canary_s: float = Field(default=600.0, gt=0, description="Judged after this long when fewer came.")
    max_error_excess: Share = Field(default=0.02, description="Error rate allowed above the old model's.")
    max_latency_ratio: float = Field(default=1.5, ge=1, description="Mean time of an answer, of the old model's.")
    drain_s: float = Field(default=600.0, gt=0, description="For the old model's last answers to end.")


class Recipe(Spec):
    """Everything that `finetune` needs to know, by verb."""

    base: BaseModelSpec
    fetch: FetchSpec
    pack: PackSpec = PackSpec()
    train: TrainSpec
    merge: MergeSpec = MergeSpec()
    publish: PublishSpec = PublishSpec()
    serve: ServeSpec = ServeSpec()
    verify: VerifySpec = VerifySpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    promote: PromoteSpec = PromoteSpec()


class QuestionsSpec(Spec):
    """Questions whose answer can be checked, for reinforcement: GSM8K's form, the answer after ####."""

    source: str = Field(
        default="shipped", description="'shipped', a Hub data set id (openai/gsm8k), or a .jsonl/.csv/.parquet file."
    )
    test_source: str = Field(default="", description="File of the test rows; empty: split off, or Hub split.")
    revision: str = Field(default="main", description="Branch, tag or commit of a Hub data set.")
    config: str = Field(default="main", description="Configuration (subset) of a Hub data set.")
    split: str = Field(default="train", description="Split of a Hub data set to train on.")
    test_split: str = Field(default="test", description="Split of a Hub data set to test on.")
    question_column: str = "question"
    answer_column: str = Field(default="answer", description="Text that ends with #### and the number.")
    instruction: str = Field(
        default='Let\'s think step by step and output the final answer after "####".',
        description="Put behind each question; verl's reward looks for what follows ####.",
    )
    data_source: str = Field(
        default="openai/gsm8k", description="Name in each row by which verl picks the reward function."
    )
    max_rows: int = Field(default=0, ge=0, description="Use only the first rows of each file or split; 0: all.")
    test_pct: float = Field(default=10.0, gt=0, lt=100, description="Share split off of a file without test_source.")
    max_rejected_pct: float = Field(default=0.0, ge=0, le=100, description="More bad rows than this: an error.")


class RaySpec(Spec):
    """The Ray cluster that a reinforcement runs on: one that is there, or one that is started here for the run."""

    address: str = Field(
        default="",
        description="URL of a cluster's dashboard (http://head:8265); empty: RAY_ADDRESS; 'local': started here.",
    )
    python: str = Field(
        default="", description="Python with verl on the cluster's nodes; empty: that of .venv-ppo on this machine."
    )
    local_nodes: Positive = Field(default=1, description="Raylets of a local cluster; more than one is for tests.")
    local_cpus: Positive = Field(default=8, description="CPUs that each raylet of a local cluster says it has.")
    local_gpus: int = Field(
        default=-1, ge=-1, description="GPUs that each raylet of a local cluster says it has; -1: those that it finds."
    )
    local_object_store_bytes: int = Field(
        default=1 << 30, ge=78_643_200, description="Shared memory of each raylet of a local cluster."
    )
    start_timeout_s: float = Field(default=180.0, gt=0, description="Until a local cluster and its nodes are there.")
    wait_for_nodes_s: float = Field(default=0.0, ge=0, description="How long missing nodes or GPUs are waited for.")
    poll_s: float = Field(default=2.0, gt=0, description="How often the job's log and state are asked for.")
    health_s: float = Field(default=30.0, gt=0, description="How often the cluster's nodes are counted meanwhile.")
    lost_after_s: float = Field(
        default=900.0, gt=0, description="A dashboard that does not answer for so long is given up; the job is left."
    )

    @field_validator("address")
    @classmethod
    def _is_dashboard(cls, value: str) -> str:
        return value if value in ("", "local") else _read_dashboard(value, ", or 'local'")


class PpoSpec(Spec):
    """PPO by verl's main_ppo on Ray. What a field is called there stands in docs/ppo.md."""

    nnodes: Positive = 2
    n_gpus_per_node: Positive = 8
    device: Literal["cuda", "npu", "cpu"] = "cuda"
    train_batch_size: Positive = Field(default=256, description="Questions of a step.")
    max_prompt_length: Positive = 512
    max_response_length: Positive = 256
    filter_overlong_prompts: bool = True
    actor_learning_rate: float = Field(default=1e-6, gt=0)
    ppo_mini_batch_size: Positive = Field(default=64, description="Questions of one update; divides train_batch_size.")
    actor_micro_batch_size_per_gpu: Positive = 4
    critic_model: str = Field(default="", description="Hub id or folder of the critic's start; empty: the base.")
    critic_learning_rate: float = Field(default=1e-5, gt=0)
    critic_micro_batch_size_per_gpu: Positive = 4
    kl_coef: float = Field(default=0.001, ge=0)
    kl_in_reward: bool = Field(
        default=True, description="Take kl_coef times the KL to the base off the reward; false: kl_coef does nothing."
    )
    rollout: str = Field(default="vllm", description="What generates: vllm, sglang, trtllm, or a plug-in's name.")
    rollout_tensor_parallel: Positive = 1
    gpu_memory_utilization: float = Field(default=0.4, gt=0, lt=1, description="Share that the rollout may hold.")
    rollout_log_prob_micro_batch_size_per_gpu: Positive = 8
    attention: Literal["flash_attention_2", "sdpa", "eager"] = "flash_attention_2"
    total_epochs: Positive = 15
    total_training_steps: int = Field(default=0, ge=0, description="Stop after so many steps; 0: by epochs.")
    save_freq: Positive = Field(default=10, description="Steps between checkpoints; the last step is always saved.")
    test_freq: Positive = Field(default=10, description="Steps between tests; the last step is always tested.")
    max_ckpt_to_keep: Positive = 2
    project_name: str = "tatara"
    experiment_name: str = "ppo"
    report_to: Literal["none", "wandb"] = Field(
        default="none", description="wandb: WANDB_API_KEY has to be set on the cluster's nodes; it is never sent."
    )
    wandb_entity: str = Field(default="", description="W&B team or user; empty: the key's own.")
    environment: dict[str, str] = Field(
        default={}, description="Variables of the job on every node (NCCL_SOCKET_IFNAME, NVTE_FUSED_ATTN ...); no keys."
    )
    overrides: tuple[str, ...] = Field(default=(), description="More of verl's hydra overrides, such as a.b=c.")

    beside: ClassVar[frozenset[str]] = frozenset(
        {"save_freq", "test_freq", "max_ckpt_to_keep", "project_name", "experiment_name", "report_to", "wandb_entity"}
    )

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        secret = sorted(name for name, said in value.items() if holds_secret(name, said))
        if secret:
            raise ValueError(
                f"{secret[0]} looks like a credential, and Ray shows a job's environment on its dashboard: set it in "
                "the environment of the cluster's nodes before `ray start`"
            )
        return value

    @field_validator("overrides")
    @classmethod
    def _are_overrides(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if not re.match(r"[+~]{0,2}[\w.@/]+(=|$)", word):
                raise ValueError(f"{word.partition('=')[0]!r} is no hydra override: expected key=value")
            if secret := secret_override(word):
                raise ValueError(
                    f"{secret} looks like a credential, and Ray shows a job's command on its dashboard: set it in the "
                    "environment of the cluster's nodes before `ray start`"
                )
            name, _, said = word.partition("=")
            if "env_vars" in said or name.endswith("env_vars"):
                raise ValueError(
                    f"{name} sets variables of the job as a whole: name each (PpoSpec.environment, or "
                    "runtime_env.env_vars.NAME=value), credentials in the environment of the cluster's nodes"
                )
        return value

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        world = self.nnodes * self.n_gpus_per_node
        if self.train_batch_size % self.ppo_mini_batch_size:
            raise ValueError(
                f"train_batch_size={self.train_batch_size} must be a multiple of "
                f"ppo_mini_batch_size={self.ppo_mini_batch_size}"
            )
        if self.ppo_mini_batch_size % world:
            raise ValueError(
                f"ppo_mini_batch_size={self.ppo_mini_batch_size} is shared by nnodes * n_gpus_per_node = {world} "
                "GPUs: choose a multiple"
            )
        if world % self.rollout_tensor_parallel:
            raise ValueError(f"rollout_tensor_parallel={self.rollout_tensor_parallel} must divide the {world} GPUs")
        return self


class PpoRecipe(Spec):
    """Everything that `reinforce-ppo` needs to know."""

    base: BaseModelSpec
    questions: QuestionsSpec = QuestionsSpec()
    ray: RaySpec = RaySpec()
    ppo: PpoSpec = PpoSpec()
    publish: PublishSpec = PublishSpec()
    serve: ServeSpec = ServeSpec()
    verify: VerifySpec = VerifySpec(must_beat_base=False)
    until: Literal["publish", "verify"] = Field(
        default="verify",
        description="publish: serve nothing, as where no GPU is free for that; `release-ppo` does the rest elsewhere.",
    )


class ReinforceRecipe(Spec):
    """Everything that `reinforce` needs to know, by verb."""

    base: BaseModelSpec
    fetch: FetchSpec
    pack: PackSpec = PackSpec()
    warm_start: TrainSpec | None = Field(
        default=None, description="SFT on the answers first, whose adapter goes on; none: rewards from the base on."
    )
    reinforce: ReinforceSpec
    merge: MergeSpec = MergeSpec()
    publish: PublishSpec = PublishSpec()
    serve: ServeSpec = ServeSpec()
    verify: VerifySpec = VerifySpec()

    @model_validator(mode="after")
    def _has_answers(self) -> Self:
        if self.fetch.text_column or self.pack.loss_on != "assistant":
            raise ValueError(
                f"rewards compare with answers, but FetchSpec.text_column={self.fetch.text_column!r} and "
                f"PackSpec.loss_on={self.pack.loss_on!r}: name question and answer columns (or chats), and 'assistant'"
            )
        return self

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        if self.warm_start and self.warm_start.lora != self.reinforce.lora:
            raise ValueError(
                f"warm_start.lora is {self.warm_start.lora}, expected that of reinforce ({self.reinforce.lora}): one "
                "adapter goes on in the other"
            )
        if self.warm_start and self.reinforce.beta:
            raise ValueError(
                f"reinforce.beta is {self.reinforce.beta:g} with a warm start: TRL would measure the KL from the base "
                "and not from what was learnt first; set beta to 0"
            )
        return self

    def as_finetune(self) -> Recipe:
        """Return the SFT recipe of the same base, data and adapter: what is checked before either is the same."""
        spec = self.reinforce
        same = {"dtype", "quantization", "rows_per_device", "gradient_accumulation", "max_steps", "keep_checkpoints"}
        train = TrainSpec(
            lora=spec.lora, attention="eager" if spec.kernels == "stock" else "auto", **spec.model_dump(include=same)
        )
        verbs = {name: getattr(self, name) for name in ("base", "fetch", "pack", "merge", "publish", "serve", "verify")}
        return Recipe(train=train, **verbs)


class BaseRelease(Spec):
    """Everything that `release-base` needs to know of a model that was pretrained here."""

    publish: PublishSpec = PublishSpec()
    serve: ServeSpec = ServeSpec()
    verify: VerifySpec = VerifySpec()


def _partial_field(annotation: Any) -> Any:  # Any: annotations are arbitrary type expressions
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return partial(annotation)
    return annotation


@cache
def partial(spec: type[Spec]) -> type[BaseModel]:
    """Return a model like `spec` whose every field may be left out, nested Specs included.

    Prefect builds its run form from it: each knob shows up, and only what is typed in changes.
    Values are range-checked when the changes are applied, by `change()`.
    """
    fields: dict[str, Any] = {  # Any: create_model takes (type, FieldInfo) pairs
        name: (
            _partial_field(field.annotation) | None,
            Field(default=None, description=field.description, title=name),
        )
        for name, field in spec.model_fields.items()
    }
    return create_model(
        f"{spec.__name__}Changes", __module__=__name__, __config__=ConfigDict(frozen=True, extra="forbid"), **fields
    )


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
    merged = dict(old)
    for name, value in new.items():
        nested = isinstance(value, dict) and isinstance(old.get(name), dict)
        merged[name] = _merge(old[name], value) if nested else value
    return merged


S = TypeVar("S", bound=Spec)


RecipeChanges = partial(Recipe)
PretrainChanges = partial(PretrainSpec)
BaseReleaseChanges = partial(BaseRelease)
PpoChanges = partial(PpoRecipe)
ReinforceChanges = partial(ReinforceRecipe)


def change(spec: S, changes: BaseModel | dict[str, Any] | None) -> S:  # Any: JSON values
    """Return `spec` with the given fields replaced and everything validated again.

    Raises SpecError that names each wrong field, its value and what was expected.

    >>> change(PackSpec(), {"row_tokens": 512}).row_tokens
    512
    >>> change(PackSpec(), {"row_tokens": 0})
    Traceback (most recent call last):
    ...
    tasks.errors.SpecError: PackSpec.row_tokens = 0: Input should be greater than 0
    """
    wanted = changes.model_dump(exclude_none=True) if isinstance(changes, BaseModel) else dict(changes or {})
    return validate(type(spec), _merge(spec.model_dump(), wanted))


def validate(spec: type[S], values: dict[str, Any]) -> S:  # Any: JSON values
    """Build a Spec from plain values; every fault in one SpecError."""
    try:
        return spec.model_validate(values)
    except ValueError as error:
        faults = getattr(error, "errors", list)()
        raise SpecError("; ".join(_fault(spec, fault) for fault in faults) or str(error)) from None


def _fault(spec: type[Spec], fault: Any) -> str:  # Any: pydantic's ErrorDetails
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{spec.__name__} has no field {path}: fields here are {', '.join(_fields_at(spec, fault['loc'][:-1]))}"
    given = fault["input"]
    if isinstance(given, (list, tuple)):  # words of a command line may hold a key
        given = hide_values(hide_secrets(str(word) for word in given))
    if isinstance(given, dict):  # of variables may be one
        given = {name: "***" if holds_secret(str(name), str(said)) else said for name, said in given.items()}
    where = f"{spec.__name__}.{path} = {given!r}" if path else spec.__name__
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"


def _fields_at(spec: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for name in path:
        field = spec.model_fields.get(str(name))
        inner = _spec_of(field.annotation) if field else None
        if inner is None:
            break
        spec = inner
    return sorted(spec.model_fields)


def _spec_of(annotation: Any) -> type[BaseModel] | None:  # Any: annotations are arbitrary type expressions
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def lora_scale(lora: LoraSpec) -> float:
    """Return the factor on B·A.  Source: LoRA 4.1; rsLoRA, arXiv:2312.03732.

    >>> lora_scale(LoraSpec(rank=8, alpha=16, target_modules=("q_proj",)))
    2.0
    """
    return lora.alpha / math.sqrt(lora.rank) if lora.rslora else lora.alpha / lora.rank
