"""Lay a trained adapter out as Hugging Face tools expect it, in one folder outside the store.

    TrainedAdapter -> final/: adapter_model.safetensors, adapter_config.json, tokenizer*, config.json, README.md, ...

Ring: edge.
"""

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, TrainedAdapter
from tasks.publish.lineage import lineage_of
from tasks.publish.staging import link, stage
from tasks.specs import PublishSpec


def save_final(adapter: TrainedAdapter, folder: Path, store: ArtifactStore, hub: HfApi) -> Path:
    """Write the adapter with all that loading it takes, but the base, to `folder`; return it.

    What was there before is replaced once the new one is whole. The same files as a publication of the adapter, and the
    base's config.json.  Raises: MissingError when the base's or the adapter's files are gone.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    lineage = lineage_of(adapter, store, hub, goes_to_hub=False)
    stage(lineage, PublishSpec(what="adapter"), f"local/{folder.parent.name}", aside)
    link(Path(lineage.base.model_folder) / "config.json", aside / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    files.fsync_folder(folder.parent)
    return folder
