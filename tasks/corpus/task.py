"""Prefect's view of a corpus: how often it may fail, what it is called, what it shows."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import TokenizedCorpus
from tasks.errors import is_worth_retrying
from tasks.specs import PretrainSpec


@task(
    task_run_name="corpus-{spec.corpus}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
    timeout_seconds=24 * 3600,
    cache_policy=NO_CACHE,  # the artifact folder is the cache
)
def prepare_corpus(spec: PretrainSpec, storage: str = "", hub_account: str = "") -> TokenizedCorpus:
    """Tokenise the corpus, with a tokenizer that is trained on it if that is wanted; a second call finds it."""
    from blocks.opening import open_hub, open_store
    from tasks.corpus import report, run
    from tasks.prefect_ui import show_markdown

    store = open_store(storage)
    corpus = run.prepare_corpus(spec, store, open_hub(hub_account))
    about = (store.manifest(TokenizedCorpus, corpus.key) or {})["about"]
    show_markdown("corpus", report.corpus_markdown(corpus, about), "Documents, tokens, lengths, three samples")
    return corpus
