"""Which attention generates and learns; the rows of a rollout are padded and cached, so not the packed one of SFT.

Ring: pure.
"""

from tasks.errors import SpecError
from tasks.gptoss.layout import MODEL_TYPE
from tasks.specs import ReinforceSpec


def choose_attention(model_type: str, spec: ReinforceSpec) -> str:
    """Return transformers' name of the attention.

    Raises: SpecError for one that would drop gpt-oss's sinks without a word.

    >>> [choose_attention(name, ReinforceSpec()) for name in ("gpt_oss", "qwen2")]
    ['eager', 'sdpa']
    >>> choose_attention("gpt_oss", ReinforceSpec(attention="flash_attention_2"))
    Traceback (most recent call last):
    ...
    tasks.errors.SpecError: ReinforceSpec.attention 'flash_attention_2' drops the sinks of gpt-oss: use eager or auto
    """
    if model_type != MODEL_TYPE:
        return "sdpa" if spec.attention == "auto" else spec.attention
    if spec.attention not in ("auto", "eager"):
        raise SpecError(f"ReinforceSpec.attention {spec.attention!r} drops the sinks of gpt-oss: use eager or auto")
    return "eager"
