"""How long a step will take, from shapes alone: said before a run starts.

    Workload + StepPlan + a device's peak -> step_seconds()

Fitted to the kernels of tasks/gptoss on one H200 and held against the baseline (tests/tasks/train/test_duration.py);
on another card it scales with the peak, which is a guess. Stock kernels and other families are not estimated.

Ring: pure.  Units: seconds, floating point operations.
"""

from tasks.costs import attention_flops, layer_weights
from tasks.targets import first_trained_layer
from tasks.train.needs import uses_fused_kernels
from tasks.train.plan import StepPlan, Workload
from tasks.train.weights import num_unpacked, resting_bytes

_MATRICES = 0.485  # share of the peak that grouped and dense GEMMs reach
_ATTENTION, _ATTENTION_WHOLE = 0.256, 0.36  # the same of flash attention, and of cuDNN's where a row is one document
_PASS_S = 0.031  # to start a pass
_SHARED_S = 4.4e-12  # to gather a byte of a base that is shared out (FSDP2), for both halves of a pass, on NVLink
_COMING_S = 1.92e-11  # for a byte of a layer that rests on the host to come, on PCIe 5
_UNPACK_S = 2.7e-11  # for a weight of such a layer to be unpacked from MXFP4
_PEFT_S = 2.8e-12  # of PEFT's own layers, for each value that goes in or out: casts and launches, no arithmetic


def step_seconds(work: Workload, plan: StepPlan, peak: float) -> float | None:
    """Return the seconds of an optimizer step; None where nothing is known.

    Args:
        work: what is trained on what, its documents' length included.
        plan: how its step is cut.
        peak: the device's dense bf16 peak, 0 when it is not known.
    """
    if not peak or not uses_fused_kernels(work.config, work.spec):
        return None
    config, num_layers = work.config, work.config["num_hidden_layers"]
    lowest, matrices = first_trained_layer(work.targets), 2.0 * layer_weights(config)
    gate = 4.0 * (config.get("num_experts_per_tok") or 1) * config["hidden_size"] * config["intermediate_size"]
    gemm = 2 * 2.0 * config["hidden_size"] * config["vocab_size"]
    attention = peft = below = 0.0
    peft_values = sum(sum(target.shape) for target in work.targets if len(target.shape) == 2) / num_layers
    for layer in range(num_layers):
        passes = 1 + (layer >= lowest) + (plan.checkpointing == "full" and layer >= lowest)
        again = gate if plan.checkpointing == "selective" and lowest <= layer < plan.num_recomputed else 0.0
        gemm += passes * matrices + again
        one = attention_flops(config, layer, work.document_tokens)
        attention += one * (passes + (layer >= lowest))  # backward is twice the forward
        peft += peft_values * (passes + (layer >= lowest))
        if layer < plan.num_offloaded:
            below += matrices / (_MATRICES * peak) + one / (_ATTENTION * peak)
    share = _ATTENTION_WHOLE if work.document_tokens >= work.row_tokens else _ATTENTION
    per_token = gemm / (_MATRICES * peak) + attention / (share * peak) + peft * _PEFT_S
    shared = work.spec.num_processes * work.needs(plan)["weights"] if work.spec.parallel == "fsdp2" else 0
    tokens = plan.rows_per_device * work.row_tokens
    coming = sum(resting_bytes(work.shapes, work.config, work.spec, plan.num_offloaded)) * _COMING_S
    unpacking = num_unpacked(work.shapes, config, work.spec, plan.num_offloaded) * _UNPACK_S
    waiting = max(0.0, coming - tokens * below - unpacking)  # a layer comes while the one before it computes
    return plan.gradient_accumulation * (tokens * per_token + _PASS_S + shared * _SHARED_S + waiting + unpacking)
