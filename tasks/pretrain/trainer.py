"""transformers' Trainer for a gpt-oss that is trained whole.

    Trainer -> MasterTrainer: float32 masters of bfloat16 weights
            -> PretrainTrainer: the fused loss, and what a step is judged by
            -> SharedTrainer: the same with weights, gradients and optimizer shared out by FSDP2

Ring: edge (live tensors, torch.distributed).  Shapes: L layers, E experts.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainingArguments

from tasks.gptoss.forward import find_decoder
from tasks.gptoss.token_mean import TokenMean
from tasks.gptoss.walks import FewWalks
from tasks.metrics import append_metrics
from tasks.pretrain.balance import usage_shares
from tasks.pretrain.masters import SplitMasters, local
from tasks.pretrain.plan import EXPERTS
from tasks.recorder import say

_WEIGHTS = "model.safetensors"  # names and places of Trainer's own checkpoints
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class MasterTrainer(Trainer):
    """Trainer that steps bfloat16 weights in float32."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; bitsandbytes keeps the moments of embeddings in float32, here as with Trainer's own."""
        optimizer = super().create_optimizer(model)
        causal: Any = self.model  # Any: Trainer types it as optional
        if causal.dtype != torch.bfloat16 or isinstance(optimizer, SplitMasters):
            return optimizer
        self.optimizer = split = SplitMasters(optimizer)
        if "bitsandbytes" in type(optimizer).__module__:
            from bitsandbytes.optim.optimizer import GlobalOptimManager  # seconds to import

            tables = {module.weight for module in causal.modules() if isinstance(module, nn.Embedding)}
            wide = [master for master, weight in zip(split.masters, split.weights, strict=True) if weight in tables]
            GlobalOptimManager.get_instance().override_config(wide, "optim_bits", 32)
        return split


class PretrainTrainer(TokenMean, FewWalks, MasterTrainer):
    """Trainer of a model after `train_head`: cross-entropy, accuracy and balance are told apart."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss per learnt token of the (accumulated) batch, the weighted balance loss included."""
        if return_outputs:  # of a validation pass: no logits ever exist
            return model(**inputs).loss, {}
        loss = model(**inputs, num_items_in_batch=num_items_in_batch).loss
        if num_items_in_batch is None:
            return loss
        return loss * self.accelerator.num_processes  # DDP and FSDP average the gradients of ranks

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """Draw the rows of the whole run, one order of all behind the other.

        Epoch by epoch the last step would be a short one, which accelerate fills up with rows that were learnt already
        where several processes share it: then their number would decide what is learnt.
        """
        rows: Any = self.train_dataset if train_dataset is None else train_dataset  # Any: torch's Dataset has no len
        args = self.args
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RandomSampler(rows, num_samples=args.max_steps * rows_per_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the cross-entropy alone as `loss`, beside it accuracy and balance; and each expert's share."""
        if "loss" in logs:
            scored = self._bare.scored
            reduce: Any = self.accelerator.reduce  # Any: typed as whatever may be reduced
            loss, hits, count, balance = reduce(scored.sums_4, "sum").tolist()
            counts_LE = reduce(scored.counts_LE, "sum")
            scored.clear()
            if count:
                logs |= {"loss": loss / count, "accuracy": hits / count, "router_aux_loss": balance / count}
                if self.is_world_process_zero():
                    record = {"step": self.state.global_step, "usage": usage_shares(counts_LE)}
                    append_metrics(Path(self.args.output_dir or ".").parent / EXPERTS, record)
        super().log(logs, start_time)

    @property
    def _bare(self) -> Any:  # Any: GptOssForCausalLM after `train_head`
        return self.model


class HostArguments(TrainingArguments):
    """Settings of a Trainer that leaves the model where it is."""

    @property
    def place_model_on_device(self) -> bool:
        """Say no."""
        return False


class SharedTrainer(PretrainTrainer):
    """Each process holds a part of weights, gradients and optimizer; checkpoints are the plain ones of one process.

    So a run goes on with any number of processes, shared or not. Costs at a checkpoint: the whole weights and moments
    in the first process' host memory.
    """

    def share(self) -> None:
        """Share the model out, layer by layer. Before the optimizer is made."""
        model: Any = self.model  # Any: Trainer types it as optional
        mesh = init_device_mesh(self.accelerator.device.type, (self.args.world_size,))
        for layer in find_decoder(model).layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        weights = list(model.parameters())
        # Mixed precision only; `prepare` would ask DDP, which refuses shared weights.
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        held, whole = (sum(part.nbytes for part in parts) for parts in (map(local, weights), weights))
        say(f"model shared over {self.args.world_size} processes: {held:,} of {whole:,} bytes here")

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole weights; every process takes part."""
        state = whole_state(self.model)
        if self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer  # Any: accelerate's wrapper
        held, weights = optimizer.state_dict(), self._weights
        moments = held.get("inner", held)
        is_first = self.is_world_process_zero()
        kept: dict[int, dict[str, Any]] = {}  # Any: tensors, and whatever else an optimizer remembers
        for number, entry in moments["state"].items():
            kept[number] = {}
            for name, value in entry.items():  # one at a time: all of them gathered would not fit a GPU
                gathered = _gathered(value, weights[number])
                if is_first:
                    kept[number][name] = gathered.cpu() if torch.is_tensor(gathered) else gathered
        whole = {**moments, "state": kept}
        if "lows" in held:
            # Two bytes of no number: NCCL sends no int16.
            parts = (low.view(torch.bfloat16) for low in held["lows"])
            lows = [_gathered(part, weight).cpu() for part, weight in zip(parts, weights, strict=True)]
            whole = {"inner": whole, "lows": [low.view(torch.int16) for low in lows]}
        if is_first:
            torch.save(whole, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(model or self.model, Path(resume_from_checkpoint) / _WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer  # Any: accelerate's wrapper
        whole, weights = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True), self._weights
        is_split = "lows" in whole
        for number, entry in (whole["inner"] if is_split else whole)["state"].items():
            for name, value in entry.items():
                if value.shape == weights[number].shape:
                    part = _shared(value, weights[number])
                    entry[name] = local(part) if is_split else part
        if is_split:
            pairs = zip((low.view(torch.bfloat16) for low in whole["lows"]), weights, strict=True)
            whole["lows"] = [local(_shared(low, weight)).view(torch.int16) for low, weight in pairs]
        optimizer.load_state_dict(whole)
        schedule = torch.load(Path(checkpoint) / _SCHEDULER, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)  # type: ignore[union-attr]

    @property
    def _weights(self) -> list[Any]:  # Any: shared parameters, in the optimizer's order
        optimizer: Any = self.optimizer  # Any: accelerate's wrapper
        bare = optimizer.optimizer
        groups = (group["params"] for group in bare.param_groups)
        return bare.weights if isinstance(bare, SplitMasters) else [weight for group in groups for weight in group]


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Return what this process holds of weights, gradients (of the weights' size), moments and what masters add.

    And its widest moment: the GPU's; 0 without one.
    """
    model: Any = trainer.model  # Any: Trainer types both as optional
    optimizer: Any = getattr(trainer.optimizer, "optimizer", None)  # below accelerate's wrapper; None: only loaded
    weights = sum(local(weight).nbytes for weight in model.parameters())
    entries = optimizer.state.values() if optimizer is not None else ()
    moments = sum(local(value).nbytes for entry in entries for value in entry.values() if torch.is_tensor(value))
    lows = sum(low.nbytes for low in optimizer.lows) if isinstance(optimizer, SplitMasters) else 0
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"weights": weights, "gradients": weights, "optimizer": moments, "masters": lows, "peak": peak}


def whole_state(model: Any) -> dict[str, torch.Tensor]:  # Any: a model, shared out or not
    """Return the whole weights on the host in the first process, nothing in the others; all take part."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        whole = _gathered(weight.detach(), weight)
        if is_first:
            state[name] = whole.cpu().contiguous()
    return state


@torch.no_grad()
def load_state(model: Any, path: Path) -> None:  # Any: as above
    """Give a model the weights of a checkpoint."""
    with safe_open(path, framework="pt") as stored:
        for name, weight in model.named_parameters():
            weight.copy_(_shared(stored.get_tensor(name), weight))


def _gathered(value: Any, like: Any) -> Any:  # Any: a tensor or number of the optimizer's state, and its parameter
    """Return the whole of a value that is shared out as its parameter is; other values as they are."""
    if isinstance(like, DTensor) and torch.is_tensor(value) and value.dim() and not isinstance(value, DTensor):
        mesh, places = like.device_mesh, like.placements
        value = DTensor.from_local(value, mesh, places, run_check=False, shape=like.shape, stride=like.stride())
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shared(whole: torch.Tensor, like: Any) -> torch.Tensor:  # Any: a parameter, shared out or not
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
