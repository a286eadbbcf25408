"""Prefect's view of pretraining."""

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
    """Train a gpt-oss from scratch; resumes from the newest whole checkpoint."""
    from blocks.opening import open_store
    from tasks.metrics import read_metrics
    from tasks.pictures import loss_curve
    from tasks.prefect_ui import Progress, show_picture
    from tasks.pretrain import run

    model = run.pretrain_model(spec, corpus, open_store(storage), Progress("pretrain-progress", "Optimizer steps"))
    picture = loss_curve(read_metrics(model.path / "metrics.jsonl"), f"Pretraining {model.short}")
    show_picture("pretrain-loss", picture, "Training loss by step")
    return model
