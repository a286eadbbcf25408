"""How a stored model is opened: what training and scoring agree on.

Ring: edge (disk, transformers). Imports no torch.
"""

from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import SpecError
from tasks.specs import BaseModelSpec
from tasks.targets import Shapes, loaded_shapes


def base_shapes(model_folder: Path) -> Shapes:
    """Return parameter name -> shape as the loaded model will have it, from safetensors headers alone."""
    headers = (files.read_safetensors_header(shard)[0] for shard in files.weight_files(model_folder))
    return loaded_shapes({name: tuple(entry["shape"]) for header in headers for name, entry in header.items()})


def is_origin_of(base: BaseModelSpec, origin: str) -> bool:
    """Say whether an artifact's `origin` is the base that a recipe names, whatever its revision.

    >>> is_origin_of(BaseModelSpec(model="openai/gpt-oss-20b"), "openai/gpt-oss-20b@6cee5e")
    True
    """
    if base.pretrain_recipe:
        return origin.startswith("pretrained ")
    names = (base.model, str(Path(base.model).expanduser().resolve()))
    return origin in names or origin.rpartition("@")[0] in names


def require_mxfp4(stored: dict[str, Any]) -> None:  # Any: config.json's quantization_config
    """Raise SpecError for a stored quantisation that can't be unpacked here."""
    if stored.get("quant_method") != "mxfp4":
        raise SpecError(f"the base is stored as {stored.get('quant_method')}: name its unquantised checkpoint")


def dequantized(stored: dict[str, Any]) -> Any:  # Any: transformers' quantisation configs share no base class
    """Return the config with which transformers unpacks a stored quantisation on load.

    gpt-oss is published as MXFP4, whose blocks have no gradient.  Raises: SpecError for any other.
    """
    require_mxfp4(stored)
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=True)
