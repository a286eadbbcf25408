"""Say what cluster a run would get, before anything is downloaded or started; or that it needs none, or has one.

Ring: edge.
"""

from collections.abc import Mapping

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PreparedQuestions, ReinforcedModel
from tasks.errors import CapacityError, UnavailableError
from tasks.ppo.attempts import find_job, named_address, read_attempt
from tasks.ppo.cluster import LOCAL, find_address, find_python, require_nodes
from tasks.ppo.run import model_key
from tasks.ray_jobs import RayJobs
from tasks.specs import PpoRecipe


def check_cluster(recipe: PpoRecipe, variables: Mapping[str, str]) -> str:
    """Say what cluster the run would get, without starting one.

    Raises: MissingError (none is named, no .venv-ppo), CapacityError, TokenError, UnavailableError.
    """
    url = find_address(recipe.ray, variables)
    if url == LOCAL:
        return f"cluster: started here for the run, with {find_python(variables)}"
    jobs = RayJobs(url, variables)
    try:
        return require_nodes(jobs, recipe.ray, recipe.ppo, 0.0)
    except CapacityError as error:
        if not recipe.ray.wait_for_nodes_s:
            raise
        return f"cluster: waited for up to {recipe.ray.wait_for_nodes_s:g} s before the run ({error})"
    finally:
        jobs.close()


def find_begun(
    recipe: PpoRecipe,
    questions: PreparedQuestions | None,
    base: BaseCheckpoint | None,
    store: ArtifactStore,
    variables: Mapping[str, str],
) -> str:
    """Say that the run needs no cluster: its model is whole, or its job runs where it was submitted; "" otherwise.

    Args:
        recipe: whose run it is.
        questions: those of the run, None when they are not prepared yet.
        base: the same.
        store: where its model goes.
        variables: the environment.
    Raises: UnavailableError when the job is on the cluster that is named now, and that does not answer.
    """
    if questions is None or base is None:
        return ""
    key = model_key(questions, base, recipe.ppo)
    if found := store.find(ReinforcedModel, key):
        return f"cluster: not needed, {found.kind}/{found.short} is whole"
    folder = store.folder(ReinforcedModel, key)
    try:
        attempt = find_job(folder, variables)
    except UnavailableError:
        begun = read_attempt(folder)
        if begun and begun.url == named_address(recipe.ray, variables):
            raise
        return ""  # the run asks it again, and for longer
    return f"cluster: job {attempt.submission_id} is at {attempt.url} and is followed there" if attempt else ""
