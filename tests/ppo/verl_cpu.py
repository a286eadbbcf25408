"""A plug-in for verl, for tests: a CPU as its device and transformers as what generates, so that main_ppo runs here.

    VERL_USE_EXTERNAL_MODULES=verl_cpu VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda python -m verl.trainer.main_ppo
        trainer.device=cpu actor_rollout_ref.rollout.name=transformers ...

verl's own trainer, FSDP engines, advantages, losses, checkpoints and reward run unchanged. Ours are the platform and
the rollout, through the registries that verl has for them, and one patched function: the critic's loader, into which
verl has written flash_attention_2. So this proves the line around verl, not its vLLM.

Runs in .venv-ppo.
"""

import os
import types
from contextlib import contextmanager

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module():
    """What verl asks of torch.cuda, answered for a CPU."""
    module = types.ModuleType("cpu_device")
    nothing = lambda *args, **kwargs: None  # noqa: E731
    for name in ("empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "ipc_collect"):
        setattr(module, name, nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args: 0)
    module.mem_get_info = lambda *args: (1 << 33, 1 << 34)
    module.get_device_name = lambda *args: "cpu"
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: torch.device("cpu")
    module.manual_seed = module.manual_seed_all = torch.manual_seed
    module.get_rng_state, module.set_rng_state = torch.get_rng_state, torch.set_rng_state
    module.is_bf16_supported = lambda: True
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """A CPU behind the interface that verl has for accelerators."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        """verl asks for "cpu:gloo,cpu:<this>", torch refuses a device named twice: the group is made here, first."""
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
            )
        return "gloo"

    def visible_devices_envvar(self):
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # verl refuses a cluster without; it is a number that `ray start` is told

    def ray_resource_options(self, num_gpus):
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


def _load_replica():
    from verl_cpu_rollout import TransformersReplica

    return TransformersReplica


def register_rollout():
    """Put the rollout into verl's two registries."""
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    base._ROLLOUT_REGISTRY["transformers", "async"] = "verl_cpu_rollout.TransformersAdapter"
    RolloutReplicaRegistry.register("transformers", _load_replica)


def load_critic(local_path, torch_dtype, model_config, trust_remote_code):
    """What verl.utils.model.load_valuehead_model does first, without the flash_attention_2 that is written into it."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path, dtype=torch_dtype, config=model_config, attn_implementation="eager"
    )


def replace_critic_loader():
    """The one place where verl is patched: its critic asks for flash-attn, which there is none of for a CPU."""
    import verl.utils.model

    verl.utils.model.load_valuehead_model = load_critic


register_rollout()
replace_critic_loader()
