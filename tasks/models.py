"""How a stored model is opened: what training and scoring agree on.

Ring: edge (transformers).
"""

from typing import Any

from tasks.errors import SpecError


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
