"""The vLLM that generates in the trainer's process: how it is opened, and how it gets what the model has learnt.

    spec    -> set_up()          -> TRL opens vLLM as the spec says
    trainer -> keep_in_step()    -> before each rollout: base + change of whole modules into vLLM's own tensors

TRL merges the adapter into the base, sends every tensor and takes the adapter out again. In bfloat16 that rounds
twice and moves the frozen base at each step, and vLLM's loader knows nothing of what its kernels made of the tensors
since. Here base + change is formed in float32 beside the base, and only modules with an adapter are sent: linear ones
through vLLM's `reload_weights`, which runs its kernels' preparation again; experts, whose loader ignores that, by us.

Ring: edge (live tensors).  Shapes: E experts, H hidden, F inner.
Trap: vLLM 0.32's `reload_weights` drops the experts of gpt-oss without a word (its loader copies into tensors that
are not there yet), as the check of the rollouts (agreement.py) found. That check is what vouches for this file.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper

from tasks.errors import RolloutError, TataraError
from tasks.lifeline import lifeline
from tasks.specs import ReinforceSpec

_EXPERT_PARTS = {  # ours -> vLLM's
    "gate_up_proj": "w13_weight",
    "gate_up_proj_bias": "w13_bias",
    "down_proj": "w2_weight",
    "down_proj_bias": "w2_bias",
}
_WARNERS = (  # of vLLM 0.26 and 0.32: they name at each step what was not sent, which stays as it is
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.model_loader.reload.inplace",
    "vllm.model_executor.model_loader.reload.layerwise",
)


@contextmanager
def blamed() -> Iterator[None]:
    """Let what vLLM raises inside be a RolloutError; memory that ran out stays what it is, and so do errors of ours."""
    try:
        yield
    except (TataraError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise RolloutError(f"vLLM failed: {type(error).__name__}: {str(error)[:1000]}") from error


@blamed()
def set_up(spec: ReinforceSpec) -> None:
    """Let TRL open vLLM in the dtype of the spec, and on a CPU without what only a GPU has.

    The log-probabilities of sampled tokens are those before top_p and top_k, as the model that learns tells its own:
    TRL weighs a completion by the product of its tokens' ratios of both, and 0.9 to the power of 200 is nothing.
    """
    from trl.generation import vllm_generation

    more: dict[str, Any] = {"dtype": spec.dtype}  # Any: vLLM's arguments
    if not torch.cuda.is_available():
        more |= {"enforce_eager": True}
    if spec.cuts_tail:  # at temperature 1, see rollouts.py: these are taken before it too
        more |= {"logprobs_mode": "raw_logprobs"}
    opened: Any = vllm_generation  # Any: LLM is imported there only where vLLM is
    opened.LLM = partial(_open, opened.LLM, more)


@blamed()
def _open(llm: Any, more: dict[str, Any], **kwargs: Any) -> Any:  # Any: vLLM's
    """Open vLLM where the system gives it a port: TRL's choice, 29500, two runs that begin together make alike."""
    lifeline.mark("open vLLM")
    os.environ["MASTER_PORT"] = "0"
    return llm(**{**kwargs, **more})


@blamed()
def keep_in_step(trainer: Any) -> None:  # Any: a GroupTrainer with vLLM
    """Let TRL's synchronisation, before the first rollout and after each step, be ours."""
    trainer.vllm_generation.sync_weights = EngineWeights(trainer.vllm_generation.llm, trainer.model).send


class EngineWeights:
    """Sends what a model has learnt to a vLLM in the same process, which has just read the same base.

    Raises: RolloutError when its experts are stored otherwise.
    """

    def __init__(self, llm: Any, model: Any) -> None:  # Any: a vllm.LLM; a PeftModel
        self._llm, self._model = llm, model
        self._runner = llm.llm_engine.model_executor.driver_worker.model_runner
        for name in _WARNERS:
            logging.getLogger(name).addFilter(_is_news)
        self._require_known_experts()

    @torch.no_grad()
    def send(self) -> None:
        """Make vLLM's weights those of base and adapter."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": linear_weights(self._model)})
        for name, parts in expert_weights(self._model):
            self._put_experts(self._find(name), parts)
        self._llm.reset_prefix_cache()

    def _find(self, name: str) -> Any:  # Any: vLLM's RoutedExperts, whose attributes nn.Module doesn't know
        """Return the module of vLLM that holds the experts `name`."""
        for theirs, module in self._runner.get_model().named_modules():
            if theirs.startswith(name) and hasattr(module, "w13_weight"):
                return module
        raise RolloutError(f"vLLM has no experts called {name}: use rollouts='transformers'")

    def _require_known_experts(self) -> None:
        """Raise RolloutError unless a GPU's vLLM stores experts as it read them: it may pad or shuffle them."""
        for name, module in self._model.named_modules():
            if not isinstance(module, ParamWrapper) or not next(module.parameters()).is_cuda:
                continue
            theirs = getattr(self._find(base_name(name)), _EXPERT_PARTS[module.parameter_name]).data
            mine = module.get_param().transpose(1, 2)
            if theirs.shape != mine.shape or not torch.equal(theirs, mine.to(theirs.dtype)):
                raise RolloutError(
                    f"vLLM's kernels keep {base_name(name)}.{module.parameter_name} in a form of their own "
                    f"{tuple(theirs.shape)}, into which nothing can be copied: use rollouts='transformers'"
                )

    def _put_experts(self, module: Any, parts: dict[str, torch.Tensor]) -> None:  # Any: as `_find` returns
        """Copy into the tensors that captured graphs read; on a CPU, whose kernels pack them, have them packed anew."""
        if not module.w13_weight.is_cpu:
            for part, tensor in parts.items():
                getattr(module, part).data.copy_(tensor)
            return
        for part, tensor in parts.items():
            own = getattr(module, part)
            fresh = tensor.to(own.dtype).contiguous()
            if part.endswith("weight"):
                setattr(module, part, torch.nn.Parameter(fresh, requires_grad=False))
            else:
                own.data = fresh.clone()
        module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("Following weights were not loaded", "%s: Failed to load weights"))


def linear_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:  # Any: a PeftModel
    """Yield weights and biases of the modules around linear layers with an adapter: vLLM joins q, k and v."""
    around = {name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, module in model.named_modules():
        own = isinstance(module, Linear)
        if name.rpartition(".")[0] in around and (own or isinstance(module, torch.nn.Linear)):
            layer: Any = module.get_base_layer() if own else module
            yield f"{base_name(name)}.weight", _merged(module) if own else layer.weight.data
            if layer.bias is not None:
                yield f"{base_name(name)}.bias", layer.bias.data


def expert_weights(model: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:  # Any: a PeftModel
    """Yield (name, vLLM's tensors) of experts with an adapter: weights (E, out, in), biases (E, out)."""
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or name.endswith(".base_layer"):
            continue  # a wrapper inside another is reached from there
        parts, inner = {}, module
        while isinstance(inner, ParamWrapper):
            parts[inner.parameter_name] = _merged(inner)
            inner = inner.base_layer
        whole = {ours: parts.get(ours, getattr(inner, ours).data) for ours in _EXPERT_PARTS}
        yield (
            base_name(name),
            {_EXPERT_PARTS[ours]: each.transpose(1, 2) if each.ndim == 3 else each for ours, each in whole.items()},
        )


def _merged(module: Any) -> torch.Tensor:  # Any: a Linear or ParamWrapper of PEFT
    """Return base + change, formed in float32 and rounded once."""
    weight = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
    (adapter,) = module.active_adapters
    return (weight.float() + module.get_delta_weight(adapter).float()).to(weight.dtype)


def base_name(name: str) -> str:
    """Return what a module is called without PEFT around it.

    >>> base_name("base_model.model.model.layers.7.mlp.experts.base_layer")
    'model.layers.7.mlp.experts'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def leave(code: int) -> None:
    """End the process at once: vLLM's own end may hang for minutes, and everything of ours is written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
