"""FSDP2 for a LoRA run: the frozen base is shared out over the processes, the adapter is whole on each.

    base on the host -> share_base() -> 1/N of each layer on each device; a layer is gathered when it passes

Only what is frozen is worth it: of gpt-oss-20b with all experts 42 GB, and the adapter with its optimizer 1.4. So
torch's `fully_shard` gets the base and leaves out the adapter, whose gradients are averaged as DDP does. Losses are
those of DDP to the bit, and adapter, optimizer and checkpoint files are the plain ones: any number of processes,
shared or not, goes on with them.

Ring: edge (live tensors, torch.distributed).
"""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tasks.errors import SpecError
from tasks.recorder import say


class HostConfig(SFTConfig):
    """Settings of a Trainer that leaves the model on the host: whole it need not fit the device."""

    @property
    def place_model_on_device(self) -> bool:
        """Say no."""
        return False


def share_base(trainer: SFTTrainer) -> None:
    """Give each process its part of the frozen weights, on its device. PEFT and our kernels must be in place.

    Layers are gathered one by one, forward and backward; what lies around them (embedding, head) once each way.
    Costs: one layer on the device beside the parts; the host's copy goes layer by layer.
    """
    model: Any = trainer.model  # Any: a PeftModel; Trainer types it as optional
    device = trainer.accelerator.device
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.to(device)
        torch.distributed.broadcast(weight.data, src=0)  # as DDP does: equal seeds alone would not be a proof
    # Not "reshard unless it is the root", torch's default: after an evaluation the root would stay gathered, one
    # rank alone saves and so frees it, and the next pass would have one rank gather and the others not.
    sharing = {
        "mesh": init_device_mesh(device.type, (trainer.args.world_size,)),
        "ignored_params": set(trained),
        "reshard_after_forward": True,
    }
    for layer in find_layers(model):
        fully_shard(layer, **sharing)
    # PEFT's model and not the one inside: `fully_shard` renames the class to FSDP..., and configs tell class names.
    fully_shard(model, **sharing)
    # Mixed precision only; `prepare` would ask DDP, which refuses shared weights.
    trainer.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    parts = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    held, whole = (sum(weight.nbytes for weight in weights) for weights in ([p.to_local() for p in parts], parts))
    say(f"base shared over {trainer.args.world_size} processes: {held:,} of {whole:,} bytes here")


def find_layers(model: Any) -> list[torch.nn.Module]:  # Any: a PeftModel
    """Return the layers of a transformers model's text part: its decoder's list, else by the names it gives for this.

    Names alone also tell blocks of images and parts of layers.  Raises: SpecError without any.
    """
    base = model.get_base_model()
    if listed := getattr(base.get_decoder(), "layers", None):
        return list(listed)
    names = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise SpecError(
            f"{type(base).__name__} does not say what its layers are: they can't be shared out or rest on the host; "
            "use TrainSpec.parallel = 'ddp' and offload_layers = 0"
        )
    return layers


@torch.no_grad()
def average_gradients(model: torch.nn.Module) -> None:
    """Make the gradients of all ranks their mean, in one collective operation."""
    slopes = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([slope.flatten() for slope in slopes])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for slope, mean in zip(slopes, flat.split([slope.numel() for slope in slopes]), strict=True):
        slope.copy_(mean.view_as(slope))
