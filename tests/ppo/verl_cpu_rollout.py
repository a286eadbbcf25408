"""The plug-in's rollout: one Ray actor per replica that generates with transformers. Runs in .venv-ppo."""

import asyncio

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


class Server:
    """A model in a process of its own, as vLLM's server is."""

    def __init__(self, path):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
        self.eos = AutoTokenizer.from_pretrained(path).eos_token_id
        self.steps, self.updates, self.lock = None, 0, asyncio.Lock()

    async def load(self, weights, global_steps):
        known = {name: value for name, value in weights.items() if name in self.model.state_dict()}
        missing = self.model.load_state_dict({name: value.float() for name, value in known.items()}, strict=False)
        tied = set(self.model._tied_weights_keys or ())
        assert set(missing.missing_keys) <= tied, missing
        self.model.tie_weights()
        self.steps, self.updates = global_steps, self.updates + 1

    async def generate(self, prompt_ids, sampling_params, request_id, **kwargs):
        assert self.updates, "asked before it was given the actor's weights"
        async with self.lock:
            return await asyncio.to_thread(self._generate, list(prompt_ids), dict(sampling_params))

    @torch.no_grad()
    def _generate(self, prompt_ids, sampling):
        limit = sampling.get("max_tokens") or sampling.get("max_new_tokens") or self.limit
        ids, said, logprobs, cache = torch.tensor([prompt_ids]), [], [], None
        while len(said) < limit:
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            temperature = sampling.get("temperature", 1.0)
            scores = torch.log_softmax(logits / (temperature or 1.0), -1)
            token = int(scores.argmax()) if not temperature else int(torch.multinomial(scores.exp(), 1))
            said.append(token)
            logprobs.append(float(scores[token]))
            if token == self.eos:
                break
            ids = torch.tensor([[token]])
        return TokenOutput(
            token_ids=said,
            log_probs=logprobs,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )

    def set_limit(self, limit):
        self.limit = limit

    async def nothing(self, *args, **kwargs):
        return None

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing

    async def set_global_steps(self, global_steps):
        self.steps = global_steps


class TransformersReplica(RolloutReplica):
    """Launches the server beside the trainer's worker."""

    async def launch_servers(self):
        node = await self.workers[0].__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
        name = f"transformers_server_{self.replica_rank}"
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        server = ray.remote(Server).options(name=name, num_cpus=0.1, scheduling_strategy=affinity, max_concurrency=64)
        self._server_handle = server.remote(self.model_config.path)
        await self._server_handle.set_limit.remote(self.config.response_length)
        self.servers = [self._server_handle]
        self._server_address = name


class TransformersAdapter(BaseRollout):
    """The trainer's side: hands the actor's weights to its server."""

    def __init__(self, config, model_config, device_mesh, **kwargs):
        super().__init__(config, model_config, device_mesh)
        self.name = f"transformers_server_{torch.distributed.get_rank()}"

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    @torch.no_grad()
    async def update_weights(self, weights, global_steps=None, **kwargs):
        full = {
            name: getattr(value, "full_tensor", lambda value=value: value)().detach().cpu() for name, value in weights
        }
        await ray.get_actor(self.name).load.remote(full, global_steps)
