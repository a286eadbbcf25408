"""Train a gpt-oss from scratch: corpus and tokenizer > GptOssForCausalLM."""

from flows.prefect_flow import flow
from flows.recipes import PretrainName, resolve_pretrain
from tasks.artifacts import PretrainedModel
from tasks.check.task import check_pretrain
from tasks.corpus.task import prepare_corpus
from tasks.pretrain.task import pretrain_model
from tasks.specs import PretrainChanges

NO_CHANGES = PretrainChanges()


@flow(name="pretrain", flow_run_name="pretrain-{recipe}", validate_parameters=True)
def pretrain(
    recipe: PretrainName = "tiny",
    changes: PretrainChanges = NO_CHANGES,  # type: ignore[valid-type]  # made by partial(), no static type
    storage: str = "",
    hub_account: str = "",
) -> PretrainedModel:
    """Run one pretraining recipe; a model that is whole already is found, not trained again.

    Args:
        recipe: name of a recipe in flows/recipes.py.
        changes: fields of the recipe to change.
        storage: name of an Artifact Storage block; empty: TATARA_HOME.
        hub_account: name of a Hub Account block; empty: HF_TOKEN.
    """
    spec = resolve_pretrain(recipe, changes)
    check_pretrain(recipe, spec, storage, hub_account)
    corpus = prepare_corpus(spec, storage, hub_account)
    return pretrain_model(spec, corpus, storage)
