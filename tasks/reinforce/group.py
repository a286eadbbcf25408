"""TRL's GRPOTrainer with our prompts, the log-probabilities of what it generates, and the check of both.

    prompts as packed -> generate (the live adapter) -> rewards -> measure_agreement -> learn

TRL renders prompts itself and, with transformers' generate, asks nobody whether what was generated came from the model
that learns. Here the tokens are those of the packed rows, and generation writes down what it sampled from.

Ring: edge (live model); runs inside a trainer process.  Shapes: B completions, T tokens, V vocabulary.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from trl.trainer.grpo_trainer import GRPOTrainer

from tasks.errors import RewardError
from tasks.lifeline import lifeline
from tasks.reinforce import vllm_engine
from tasks.reinforce.agreement import Agreement, measure_agreement, require_adapter
from tasks.reinforce.continuous import ContinuousEngine
from tasks.reinforce.own import require_scores
from tasks.reinforce.prompts import Prompt
from tasks.reinforce.rewards import RewardFn
from tasks.reinforce.said import IN_REWARD, Said, answer_text

_MOST_NAMED = 8  # questions in a message
Row = dict[str, Any]  # Any: a row of generations.csv


class SampledLogprobs:
    """Writes down the log-probability of each token as it is sampled, at the temperature it is sampled with.

    generate() hands logits to a processor before it samples, and the sampled tokens to a stopping criterion after;
    keeping every step's logits instead would be T x B x V floats.
    """

    def __init__(self, temperature: float, step: int) -> None:
        self.temperature, self.step = temperature, step
        self._logits_BV: torch.Tensor | None = None
        self._columns: list[torch.Tensor] = []

    def remember(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the logits of the step that is being sampled; as a logits processor it changes nothing."""
        del input_ids
        self._logits_BV = scores.float()
        return scores

    def take(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # Any: generate's own
        """Look up what was sampled; as a stopping criterion it stops nothing."""
        del scores, kwargs
        assert self._logits_BV is not None
        logits_BV = self._logits_BV / self.temperature
        chosen_B = logits_BV.gather(1, input_ids[:, -1:])[:, 0]
        self._columns.append(chosen_B - logits_BV.logsumexp(1))
        lifeline.beat("rollout", self.step)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def lists(self, completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return one number a token of each completion; what was generated behind its end is left out."""
        all_BT = torch.stack(self._columns, dim=1).cpu()
        return [all_BT[row, : len(ids)].tolist() for row, ids in enumerate(completions)]


@dataclass(kw_only=True)
class Rollout:
    """What the last rollout was: its rows for generations.csv, its agreement, its times and sizes."""

    rows: list[Row]
    agreement: Agreement
    num_generated: int
    num_learnt: int  # prompt tokens too
    generate_s: float
    score_s: float  # rewards, and the passes that compare


@dataclass(kw_only=True)
class Wanted:
    """What our trainer needs beside TRL's settings."""

    prompts: Sequence[Prompt]
    rewards: Mapping[str, tuple[RewardFn, float]]  # column -> function, weight
    least_share: float
    engine: str = "transformers"
    continuous: ContinuousEngine | None = None  # rollouts by transformers' continuous batching
    said: list[Said] = field(default_factory=list)  # of the rollout that is being scored

    def functions(self, tokenizer: Any, ends: Sequence[int]) -> list[Any]:  # Any: TRL's reward functions
        """Return the rewards as TRL calls them."""
        return [self._function(name, score, tokenizer, ends) for name, (score, _) in self.rewards.items()]

    def _function(self, name: str, score: RewardFn, tokenizer: Any, ends: Sequence[int]) -> Any:  # Any: as above
        def reward(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float]:  # Any: TRL's own
            del kwargs
            if name == next(iter(self.rewards)):  # the first of them reads what was said for all
                self.said = [
                    read_completion(ids, self.prompts[number], tokenizer, ends)
                    for ids, number in zip(completion_ids, row, strict=True)
                ]
            lifeline.mark(f"{IN_REWARD} {name}")
            try:
                return require_scores(score(self.said), self.said, name)
            except RewardError as error:
                asked = sorted({*row})
                more = f" and {len(asked) - _MOST_NAMED} more" if len(asked) > _MOST_NAMED else ""
                numbers = ", ".join(map(str, asked[:_MOST_NAMED]))
                raise RewardError(
                    f"{error}. It was asked about {len(row)} completions of the questions {numbers}{more} (`prompt` in "
                    "the generations' CSV)"
                ) from error
            finally:
                lifeline.mark("scored")

        reward.__name__ = name
        return reward


def read_completion(ids: Sequence[int], prompt: Prompt, tokenizer: Any, ends: Sequence[int]) -> Said:  # Any: as above
    """Return a completion as rewards see it."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    return Said(
        question=prompt.question,
        answer=prompt.answer,
        text=answer_text(whole),
        whole=whole,
        num_tokens=len(ids),
        is_finished=bool(ids) and ids[-1] in ends,
    )


class GroupTrainer(GRPOTrainer):
    """GRPOTrainer that asks packed prompts and refuses rollouts of another model; `wanted` is set once it is made."""

    wanted: Wanted
    rollout: Rollout | None = None  # of the step that is being learnt; taken by the recorder
    _generate_s = 0.0

    def _get_train_sampler(self, dataset: Any = None) -> Any:  # Any: TRL's RepeatSampler
        """Return TRL's sampler, which Trainer tells the epoch: a resumed run asks what it would have asked."""
        sampler: Any = super()._get_train_sampler(dataset)  # Any: gets a method
        sampler.set_epoch = partial(start_epoch, sampler)
        return sampler

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the ids of prompts, which are numbers of `wanted.prompts`."""
        return [list(self.wanted.prompts[int(number)].ids) for number in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:  # Any: TRL's signature
        """Generate, with the log-probability of each sampled token."""
        started = time.monotonic()
        lifeline.mark("rollout")
        if self.use_vllm:
            with vllm_engine.blamed():
                ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        elif self.wanted.continuous:
            ids, logprobs = self.wanted.continuous.generate(self, prompt_ids)
        else:
            watch = SampledLogprobs(self.temperature, self.state.global_step)
            model: Any = self.accelerator.unwrap_model(self.model)  # Any: a PeftModel
            model.generate = partial(
                model.generate,
                logits_processor=LogitsProcessorList([_Processor(watch)]),  # type: ignore[list-item]  # duck-typed
                stopping_criteria=StoppingCriteriaList([_Criterion(watch)]),  # type: ignore[list-item]  # as above
            )
            try:
                ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            finally:
                del model.generate
            logprobs = watch.lists(ids)
        self._generate_s = time.monotonic() - started
        return ids, logprobs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:  # Any: TRL's batch
        """Generate and score a batch, then see that it was generated with the adapter. Raises RolloutError."""
        started = time.monotonic()
        output = super()._generate_and_score_completions(inputs)
        step = self.state.global_step + 1
        found = self._measure(output)
        require_adapter(found, self.wanted.least_share, step, self.wanted.engine)
        lengths = [said.num_tokens for said in self.wanted.said]
        self.rollout = Rollout(
            rows=self._rows(inputs, step),
            agreement=found,
            num_generated=sum(lengths),
            num_learnt=sum(lengths) + int(output["prompt_mask"].sum()),
            generate_s=self._generate_s,
            score_s=time.monotonic() - started - self._generate_s,
        )
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **kwargs: Any
    ) -> Any:  # Any: TRL's signature
        """Score the completions. TRL's fused head scores every position of the prompts too where there is no GPU."""
        if input_ids.is_cuda:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **kwargs
            )
        size, scored = kwargs.get("batch_size") or len(input_ids), []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            scored.append(
                score_completions(model, input_ids[part], attention_mask[part], logits_to_keep, self.temperature)
            )
        logps, entropies = (torch.cat(each) for each in zip(*scored, strict=True))
        return logps, entropies, None

    @torch.no_grad()
    def _measure(self, output: dict[str, Any]) -> Agreement:  # Any: TRL's batch
        """Score the sampled tokens with the adapter and without. Cost: two forward passes, fewer with vLLM or a KL."""
        ids_BT = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask_BT = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        keep, rows = output["completion_ids"].size(1), self.args.per_device_train_batch_size

        def score() -> torch.Tensor:
            lifeline.beat("compare", self.state.global_step)
            return self._get_per_token_logps_and_entropies(self.model, ids_BT, mask_BT, keep, batch_size=rows)[0]

        policy = output.get("old_per_token_logps")
        policy = score() if policy is None else policy
        base = output.get("ref_per_token_logps")  # with an adapter TRL's reference is the model without it
        if base is None:
            model: Any = self.accelerator.unwrap_model(self.model)  # Any: a PeftModel
            with model.disable_adapter():
                base = score()
        return measure_agreement(output["sampling_per_token_logps"], policy, base, output["completion_mask"])

    def _rows(self, inputs: list[dict[str, Any]], step: int) -> list[Row]:  # Any: TRL's batch
        count = len(inputs)
        scores = {name: list(self._logs["rewards"][name])[-count:] for name in self.wanted.rewards}
        weights = {name: weight for name, (_, weight) in self.wanted.rewards.items()}
        advantages = list(self._logs["advantages"])[-count:]
        return [
            {
                "step": step,
                "prompt": entry["row"],
                "question": said.question,
                "completion": said.text,
                "answer": said.answer,
                **{name: scores[name][place] for name in scores},
                "reward": sum(weights[name] * scores[name][place] for name in scores),
                "advantage": advantages[place],
                "num_tokens": said.num_tokens,
                "finished_itself": int(said.is_finished),
                "whole": said.whole,
            }
            for place, (entry, said) in enumerate(zip(inputs, self.wanted.said, strict=True))
        ]


def start_epoch(sampler: Any, epoch: int) -> None:  # Any: TRL's RepeatSampler
    """Bring a sampler to where it is after so many epochs; by itself it begins a resumed run in the first order.

    >>> from trl.trainer.utils import RepeatSampler
    >>> whole, resumed = (RepeatSampler(range(9), mini_repeat_count=1, seed=0) for _ in range(2))
    >>> first, second = list(whole), list(whole)
    >>> start_epoch(resumed, 1)
    >>> list(resumed) == second != first
    True
    """
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(epoch):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


def score_completions(
    model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, keep: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:  # Any: a PeftModel
    """Return log-probability and entropy of the last `keep` tokens, at a temperature; 0 where the mask is."""
    logits = model(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=keep + 1, use_cache=False).logits
    logp_BTV = (logits[:, :-1].float() / temperature).log_softmax(-1)
    is_padded = mask_BT[:, -keep:] == 0
    chosen_BT = logp_BTV.gather(-1, ids_BT[:, -keep:, None])[..., 0].masked_fill(is_padded, 0.0)
    with torch.no_grad():
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1).masked_fill(is_padded, 0.0)
    return chosen_BT, entropy_BT


class _Processor:
    def __init__(self, watch: SampledLogprobs) -> None:
        self._watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._watch.remember(input_ids, scores)


class _Criterion:
    def __init__(self, watch: SampledLogprobs) -> None:
        self._watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # Any: generate's own
        return self._watch.take(input_ids, scores, **kwargs)
