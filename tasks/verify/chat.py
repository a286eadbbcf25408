"""Chat with the endpoint as any user would, whole and streamed, and look at its contract.

Ring: edge.
"""

import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tasks.artifacts import ServedModel
from tasks.errors import AttestationError, CorruptError, ServiceError
from tasks.gptoss.tokenizer import can_chat
from tasks.specs import VerifySpec
from tasks.verify import contract
from tasks.verify.client import post_json, stream_choices, text_of
from tasks.verify.completions import ask_completions

Json = dict[str, Any]  # Any: JSON values


def ask(served: ServedModel, spec: VerifySpec, folder: Path) -> tuple[Json, AttestationError | None]:
    """Ask the recipe's question, once whole and once streamed; return what was said, and the first broken contract.

    Args:
        served: the live endpoint.
        spec: the question.
        folder: the merged model's, whose tokenizer and template count.
    A gpt-oss with a vocabulary of its own is asked by completions: vLLM can't chat with it.
    Raises: ServiceError when nothing is said.
    """
    if not can_chat(folder):
        return ask_completions(served, spec, folder)
    url = f"{served.gateway_url}/v1/chat/completions"
    messages = [{"role": "user", "content": spec.question}]
    body: Json = {
        "model": served.served_model_name,
        "messages": messages,
        "max_tokens": spec.max_answer_tokens,
        "temperature": 0.0,
    }
    start = time.monotonic()
    reply = post_json(url, {**body, "return_token_ids": True}, spec.request_timeout_s)
    seconds = time.monotonic() - start
    if "tatara" in reply:  # the gateway marks what vLLM did not say
        raise ServiceError(f"{url} was answered by {reply['tatara']}, not by vLLM: unset LITE_CANNED and LITE_MODEL")
    choices = list(stream_choices(url, body, spec.request_timeout_s))
    pieces = [(when, text) for when, choice in choices if (text := text_of(choice.get("delta") or {}))]
    answer = text_of(reply["choices"][0]["message"])
    streamed = "".join(text for _, text in pieces)
    if not answer or not streamed:
        raise ServiceError(f"{url} answered {spec.question!r} with nothing (whole: {answer!r}, streamed: {streamed!r})")
    about: Json = {
        "question": spec.question,
        "answer": answer,
        "seconds": round(seconds, 3),
        "first_token_s": round(pieces[0][0], 3),
        "num_stream_pieces": len(pieces),
        "usage": reply.get("usage"),
        "finish_reason": reply["choices"][0].get("finish_reason"),
    }
    choices_only = [choice for _, choice in choices]
    about["format"] = _find_markers(reply, choices_only, folder)
    broken = _find_broken(reply, choices_only, messages, spec, folder)
    if about["format"] and not spec.may_break_format:
        broken = broken or AttestationError(about["format"])
    return about, broken


def _find_markers(reply: Json, choices: list[Json], folder: Path) -> str:
    """Return what is wrong with the text of either answer, empty when nothing is."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: transformers' tokenizers share no useful base class
    streamed = {"content": "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)}
    try:
        for message in (reply["choices"][0]["message"], streamed):
            contract.check_message(message, tokenizer.all_special_tokens)
    except AttestationError as error:
        return str(error)
    return ""


def _find_broken(
    reply: Json, choices: list[Json], messages: list[dict[str, str]], spec: VerifySpec, folder: Path
) -> AttestationError | None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: as above
    ids = reply.get("prompt_token_ids")
    if not isinstance(ids, list):
        raise CorruptError(f"the endpoint returned no ids of the prompt ({str(ids)[:100]}): is it vLLM?")
    whole = reply["choices"][0]
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    num_tokens = (reply.get("usage") or {}).get("completion_tokens", 0)
    try:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        contract.check_prompt(tokenizer.decode(ids, clean_up_tokenization_spaces=False), expected)
        contract.check_end(whole.get("finish_reason"), num_tokens, spec.max_answer_tokens)
        contract.check_end(ends[-1] if ends else None, num_tokens, spec.max_answer_tokens)
    except AttestationError as error:
        return error
    return None


def check_texts(served: ServedModel, spec: VerifySpec, folder: Path) -> AttestationError | None:
    """Return an error when the server reads a text as other tokens than the merged model's tokenizer does."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: as above
    body = {
        "model": served.served_model_name,
        "prompt": contract.TEXT,
        "max_tokens": 1,
        "logprobs": 0,  # never a matter for the lite model
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    reply = post_json(f"{served.gateway_url}/v1/completions", body, spec.request_timeout_s)
    ids = (reply.get("choices") or [{}])[0].get("prompt_token_ids")
    try:
        contract.check_text_ids(ids, tokenizer(contract.TEXT, add_special_tokens=False).input_ids)
    except AttestationError as error:
        return error
    return None
