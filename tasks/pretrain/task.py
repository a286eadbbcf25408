"""Prefect's view of pretraining."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import PretrainedModel, TokenizedCorpus
from tasks.errors import is_worth_retrying
from tasks.specs import PretrainSpec


@task(
    task_run_name="pretrain-{spec.shape.num_layers}-layers",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def pretrain_model(spec: PretrainSpec, corpus: TokenizedCorpus, storage: str = "") -> PretrainedModel:
    """Train a gpt-oss from scratch; resumes from the newest whole checkpoint. Its pictures are renewed as it runs."""
    from blocks.opening import open_store
    from tasks.prefect_ui import Live, Progress
    from tasks.pretrain import run
    from tasks.pretrain.live import look
    from tasks.pretrain.plan import pretraining_needs

    store = open_store(storage)
    folder = store.folder(PretrainedModel, run.pretrain_key(spec, corpus.pins))
    estimate_bytes = sum(pretraining_needs(spec).values())
    progress, live = Progress("pretrain-progress", "Optimizer steps"), Live(lambda: look(folder, estimate_bytes))

    def follow(record: dict[str, Any]) -> None:  # Any: a metrics record
        progress(record)
        live(record)

    model = run.pretrain_model(spec, corpus, store, follow)
    live.renew()
    return model


@task(task_run_name="find-pretrained-{name}", cache_policy=NO_CACHE)
def find_pretrained(name: str, recipe: str, specs: dict[str, PretrainSpec], storage: str = "") -> PretrainedModel:
    """Find a pretrained model by the first digits of its key, or the newest of this recipe as `latest`."""
    from blocks.opening import open_store
    from tasks.pretrain.found import find_pretrained

    return find_pretrained(name, recipe, specs, open_store(storage))
