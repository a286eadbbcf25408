"""Ask a model that can't chat: /v1/completions, whole and streamed, is all of its contract.

vLLM reads every chat with a gpt_oss as harmony, whose token ids a vocabulary of its own does not have; the gateway
sends /v1/generate as a chat. Both are asked once, so that the report says what a client gets there.

Ring: edge.
"""

import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tasks.artifacts import ServedModel
from tasks.errors import AttestationError, ServiceError, TransientError
from tasks.specs import VerifySpec
from tasks.verify import contract
from tasks.verify.client import post_json, stream_choices

Json = dict[str, Any]  # Any: JSON values
CONTRACT = "completions"


def ask_completions(served: ServedModel, spec: VerifySpec, folder: Path) -> tuple[Json, AttestationError | None]:
    """Let the model continue the recipe's question; return what was said, and the first broken contract.

    Args:
        served: the live endpoint.
        spec: the question, here what a text begins with.
        folder: the model's, whose tokenizer counts.
    Raises: ServiceError when nothing is said.
    """
    url = f"{served.gateway_url}/v1/completions"
    body: Json = {
        "model": served.served_model_name,
        "prompt": spec.question,
        "max_tokens": spec.max_answer_tokens,
        "temperature": 0.0,
        "logprobs": 0,  # never a matter for the lite model
    }
    start = time.monotonic()
    reply = post_json(url, {**body, "return_token_ids": True}, spec.request_timeout_s)
    seconds = time.monotonic() - start
    if "tatara" in reply:  # the gateway marks what vLLM did not say
        raise ServiceError(f"{url} was answered by {reply['tatara']}, not by vLLM: unset LITE_CANNED and LITE_MODEL")
    choices = list(stream_choices(url, body, spec.request_timeout_s))
    whole, pieces = reply["choices"][0], [(when, text) for when, each in choices if (text := each.get("text"))]
    streamed = "".join(text for _, text in pieces)
    if not whole.get("text") or not streamed:
        raise ServiceError(
            f"{url} continued {spec.question!r} with nothing (whole: {whole.get('text')!r}, streamed: {streamed!r})"
        )
    about: Json = {
        "contract": CONTRACT,
        "question": spec.question,
        "answer": whole["text"],
        "seconds": round(seconds, 3),
        "first_token_s": round(pieces[0][0], 3),
        "num_stream_pieces": len(pieces),
        "usage": reply.get("usage"),
        "finish_reason": whole.get("finish_reason"),
        "format": "",
        "not_served": {path: _refusal(served, path, spec) for path in ("/v1/chat/completions", "/v1/generate")},
    }
    ends = [choice["finish_reason"] for _, choice in choices if choice.get("finish_reason")]
    return about, _find_broken(reply, ends[-1] if ends else None, spec, folder)


def _find_broken(reply: Json, streamed_end: object, spec: VerifySpec, folder: Path) -> AttestationError | None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: transformers' tokenizers share no useful base class
    whole, num_tokens = reply["choices"][0], (reply.get("usage") or {}).get("completion_tokens", 0)
    try:
        contract.check_ids(whole.get("prompt_token_ids"), tokenizer(spec.question).input_ids, spec.question)
        contract.check_end(whole.get("finish_reason"), num_tokens, spec.max_answer_tokens)
        contract.check_end(streamed_end, num_tokens, spec.max_answer_tokens)
    except AttestationError as error:
        return error
    return None


def _refusal(served: ServedModel, path: str, spec: VerifySpec) -> str:
    """Return what the endpoint says to a chat: part of the report, not of the verdict."""
    body: Json = {"model": served.served_model_name, "max_tokens": 1}
    body |= {"input": "hi"} if path.endswith("generate") else {"messages": [{"role": "user", "content": "hi"}]}
    try:
        post_json(f"{served.gateway_url}{path}", body, spec.request_timeout_s)
    except ServiceError as error:
        return str(error).partition(" answered ")[2][:160] or str(error)[:160]
    except TransientError as error:
        return str(error)[:160]
    return "200, but what it says is no answer to the chat: it was rendered with ids of another vocabulary"
