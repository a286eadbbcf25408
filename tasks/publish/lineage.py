"""Collect what the model card tells: artifacts and knobs from the store, licences from the cards of base and data.

Ring: edge (disk; asks the Hub for two cards, each at its pinned commit).
"""

import logging
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.repocard_data import CardData

from tasks import files
from tasks.artifacts import (
    Artifact,
    ArtifactStore,
    BaseCheckpoint,
    FetchedDataset,
    MergedModel,
    PackedDataset,
    PreparedQuestions,
    PretrainedModel,
    ReinforcedModel,
    TokenizedCorpus,
    TrainedAdapter,
    TrainedModel,
)
from tasks.errors import MissingError, TataraError, TransientError
from tasks.gptoss.tokenizer import can_chat
from tasks.hub import hub_errors
from tasks.metrics import read_metrics
from tasks.publish.base_card import BaseLineage
from tasks.publish.facts import Lineage, SourceCard
from tasks.publish.names import hub_id
from tasks.publish.reinforced_card import ReinforcedLineage

_ROOT = Path(__file__).resolve().parents[2]
_SHIPPED_CARD = _ROOT / "data" / "ja_culture" / "README.md"
_QUESTIONS_CARD = _ROOT / "data" / "word_problems" / "README.md"
_SHIPPED_CORPORA = {"shipped": "ja_culture", "short_english": "short_english"}
_PACKAGES = ("tatara", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")
logger = logging.getLogger(__name__)


def lineage_of(source: MergedModel | TrainedAdapter, store: ArtifactStore, hub: HfApi, *, goes_to_hub: bool) -> Lineage:
    """Collect the artifacts behind a model.

    Args:
        source: the merged model, or the adapter when nothing was merged.
        store: holds its ancestors.
        hub: asked for the cards of base and data.
        goes_to_hub: whether it goes to the Hub; then a Hub that is away is an error, else the licence stays unknown.
    """
    adapter = source if isinstance(source, TrainedAdapter) else store.ancestor(source, TrainedAdapter)
    base, dataset = store.ancestor(adapter, BaseCheckpoint), store.ancestor(adapter, FetchedDataset)
    packed = store.ancestor(adapter, PackedDataset)
    made = {"base": base, "fetch": dataset, "pack": packed, "train": adapter}
    merged = source if isinstance(source, MergedModel) else None
    if begun := next((parent for parent in adapter.parents if parent.startswith("adapter/")), ""):
        made["warm_start"] = store.load(begun)
    return Lineage(
        base=base,
        dataset=dataset,
        packed=packed,
        adapter=adapter,
        merged=merged,
        specs={verb: _manifest(store, artifact).get("spec", {}) for verb, artifact in made.items()}
        | ({"merge": _manifest(store, merged).get("spec", {})} if merged else {}),
        changes=_changes(_manifest(store, merged)) if merged else [],
        records=read_metrics(adapter.path / "metrics.jsonl"),
        evaluations=read_metrics(adapter.path / "evaluations.jsonl"),
        base_card=_base_card(base, _manifest(store, base).get("spec", {}), hub, goes_to_hub=goes_to_hub),
        data_card=_data_card(dataset, hub, goes_to_hub=goes_to_hub),
        versions=_versions(),
    )


def whole_lineage_of(
    model: TrainedModel, store: ArtifactStore, hub: HfApi, *, goes_to_hub: bool
) -> BaseLineage | ReinforcedLineage:
    """Collect what is known of a model that was trained as a whole; the arguments are lineage_of's."""
    if isinstance(model, ReinforcedModel):
        return _reinforced_lineage(model, store, hub, goes_to_hub=goes_to_hub)
    if isinstance(model, PretrainedModel):
        return _base_lineage(model, store, hub, goes_to_hub=goes_to_hub)
    raise TypeError(f"{model.ref} is a {type(model).__name__}: no card is known for it")


def _reinforced_lineage(
    model: ReinforcedModel, store: ArtifactStore, hub: HfApi, *, goes_to_hub: bool
) -> ReinforcedLineage:
    manifest = _manifest(store, model)
    base, questions = store.ancestor(model, BaseCheckpoint), _questions(model, store)
    trained_with = manifest.get("about", {}).get("versions", {})
    return ReinforcedLineage(
        model=model,
        base=base,
        questions=questions,
        spec=manifest.get("spec", {}),
        questions_spec=_manifest(store, questions).get("spec", {}) if questions else {},
        records=read_metrics(model.path / "metrics.jsonl"),
        base_card=_base_card(base, _manifest(store, base).get("spec", {}), hub, goes_to_hub=goes_to_hub),
        data_card=_questions_card(questions, hub, goes_to_hub=goes_to_hub) if questions else SourceCard(),
        versions={"tatara": _versions().get("tatara", ""), **trained_with},
    )


def _questions(model: ReinforcedModel, store: ArtifactStore) -> PreparedQuestions | None:
    try:
        return store.ancestor(model, PreparedQuestions)
    except MissingError:  # cleared away
        return None


def _questions_card(questions: PreparedQuestions, hub: HfApi, *, goes_to_hub: bool) -> SourceCard:
    if questions.source == "shipped":
        return _local_card(_QUESTIONS_CARD)
    if hub_id(questions.source):
        return _hub_card(hub, questions.source, questions.revision, "dataset", goes_to_hub=goes_to_hub)
    return SourceCard()


def _base_lineage(model: PretrainedModel, store: ArtifactStore, hub: HfApi, *, goes_to_hub: bool) -> BaseLineage:
    manifest = _manifest(store, model)
    spec = manifest.get("spec", {})
    return BaseLineage(
        model=model,
        spec=spec,
        config=files.read_json(Path(model.model_folder) / "config.json"),
        about=manifest.get("about", {}),
        corpus=_corpus(model, store),
        records=read_metrics(model.path / "metrics.jsonl"),
        corpus_card=_corpus_card(spec, _corpus(model, store), hub, goes_to_hub=goes_to_hub),
        can_chat=can_chat(Path(model.model_folder)),
        versions=_versions(),
    )


def _corpus(model: PretrainedModel, store: ArtifactStore) -> dict[str, Any]:  # Any: an artifact's fields
    try:
        return store.ancestor(model, TokenizedCorpus).model_dump(mode="json")
    except MissingError:  # cleared away, or the model is older than this kind
        return {}


def _corpus_card(spec: dict[str, Any], corpus: dict[str, Any], hub: HfApi, *, goes_to_hub: bool) -> SourceCard:
    name = str(spec.get("corpus", ""))
    if name in _SHIPPED_CORPORA:
        return _local_card(_ROOT / "data" / _SHIPPED_CORPORA[name] / "README.md")
    commit = (corpus.get("pins") or {}).get("corpus", "")
    if hub_id(name) and commit:
        return _hub_card(hub, name, commit, "dataset", goes_to_hub=goes_to_hub)
    return SourceCard()


def _manifest(store: ArtifactStore, artifact: Artifact) -> dict[str, Any]:  # Any: JSON values
    return store.manifest(type(artifact), artifact.key) or {}


def _changes(manifest: dict[str, Any]) -> list[dict[str, Any]]:  # Any: JSON values
    ledger = manifest.get("about", {}).get("ledger", [])
    entries = ledger.get("changes", []) if isinstance(ledger, dict) else ledger
    return [entry for entry in entries if isinstance(entry, dict)]


def _base_card(base: BaseCheckpoint, spec: dict[str, Any], hub: HfApi, *, goes_to_hub: bool) -> SourceCard:  # Any: JSON
    if isinstance(base, PretrainedModel):  # made here: it is what its corpus allows
        return _corpus_card(spec, {}, hub, goes_to_hub=goes_to_hub)
    name, _, commit = base.origin.rpartition("@")
    if hub_id(name):
        return _hub_card(hub, name, commit, "model", goes_to_hub=goes_to_hub)
    return _local_card(Path(base.model_folder) / "README.md")


def _data_card(dataset: FetchedDataset, hub: HfApi, *, goes_to_hub: bool) -> SourceCard:
    if dataset.source == "shipped":
        return _local_card(_SHIPPED_CARD)
    if dataset.source.startswith("shipped:"):
        return _local_card(_ROOT / "data" / dataset.source.partition(":")[2] / "README.md")
    if hub_id(dataset.source):
        return _hub_card(hub, dataset.source, dataset.revision, "dataset", goes_to_hub=goes_to_hub)
    return SourceCard()


def _hub_card(hub: HfApi, name: str, commit: str, kind: str, *, goes_to_hub: bool) -> SourceCard:
    try:
        with hub_errors(f"the licence of {kind} {name}@{commit[:8]}"):
            ask = hub.model_info if kind == "model" else hub.dataset_info
            return _of_card(ask(name, revision=commit, timeout=10).card_data)
    except TransientError:
        if goes_to_hub:
            raise
    except TataraError as error:  # gone, gated or offline: the card says that it is not known
        logger.info("%s", error)
    return SourceCard()


def _local_card(path: Path) -> SourceCard:
    try:
        return _of_card(RepoCard(path.read_text(), ignore_metadata_errors=True).data)
    except (OSError, ValueError):  # no card, or one without front matter
        return SourceCard()


def _of_card(data: CardData | None) -> SourceCard:
    values = data.to_dict() if data else {}
    languages = values.get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    license = values.get("license") or ""
    return SourceCard(
        license=", ".join(map(str, license)) if isinstance(license, list) else str(license),
        license_name=str(values.get("license_name") or ""),
        license_link=str(values.get("license_link") or ""),
        languages=tuple(str(name) for name in languages),
    )


def _versions() -> dict[str, str]:
    found = {"python": python_version(), "tatara": _commit_of_checkout()}
    for name in _PACKAGES:
        try:
            found[name] = " ".join(filter(None, (version(name), found.get(name, ""))))
        except PackageNotFoundError:
            continue
    return {name: text for name, text in found.items() if text}


def _commit_of_checkout() -> str:
    """Return "at <commit>" of the code that runs, "" when it is no git checkout."""
    if not (_ROOT / ".git").exists():
        return ""
    asked = subprocess.run(["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return f"at {asked.stdout.strip()}" if asked.returncode == 0 else ""
