"""The whole line with real vLLM: a one-layer gpt-oss with the true vocabulary, so that vLLM's harmony path is the
production one.
"""

import re

import pytest

from tasks.artifacts import HealthReport, PublishedModel
from tasks.errors import AttestationError
from tasks.serve.run import serve_model
from tasks.verify.client import post_json
from tasks.verify.run import verify_model
from tests import notebooks
from tests.flows.conftest import Line

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_the_served_endpoint_agrees_with_the_files_and_beats_the_base(verified: Line):
    report = verified.store.committed(HealthReport)[-1]
    assert report.passed
    assert abs(report.served_logprob - report.merged_logprob) < 1e-3
    assert report.served_logprob > report.base_logprob + 0.02
    assert report.answer


def test_the_walkthrough_notebook_tells_it(verified: Line):
    code, said = notebooks.run("walkthrough.ipynb", verified.env, verified.folder / "walk.log")
    assert code == 0, said
    report = verified.store.committed(HealthReport)[-1]
    assert f"served_logprob  {report.served_logprob}" in said and "passed          True" in said
    kinds = ["base", "dataset", "packed", "adapter", "merged", "published", "served", "health"]
    assert [row.split()[0] for row in said.splitlines() if " s  " in row] == kinds
    assert re.search(r"\d+ of \d+ tensors changed\n +[\d.]+  model\.layers\.0\.", said)
    assert re.search(r"[1-9]\d* traces wait in the queue\n[0-9a-f-]{36}  /v1/\S+  ok  ", said)


def ask_vllm(line: Line, path: str, body: dict) -> dict:
    url = f"http://127.0.0.1:{line.recipe.serve.vllm_port}{path}"
    return post_json(url, {"model": line.recipe.serve.served_model_name, "temperature": 0, **body}, 120)


def test_vllm_puts_the_same_prompt_before_the_model_as_training_did(verified: Line):
    """The harmony path of the server renders a chat to the ids of our tokenizer's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(verified.store.committed(PublishedModel)[-1].model_folder)
    chat = [{"role": "user", "content": "茶道の歴史を、できるだけ詳しく教えてください。" * 6}]
    reply = ask_vllm(verified, "/v1/chat/completions", {"messages": chat, "max_tokens": 4, "return_token_ids": True})
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert reply["prompt_token_ids"] == tokenizer(prompt).input_ids


def test_served_logprobs_are_those_of_transformers_token_by_token(verified: Line):
    """Long enough to leave the sliding window; several prompts in one request."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = verified.store.committed(PublishedModel)[-1].model_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = ("七夕はいつ？七月七日です。", "京都の八坂神社の祭礼で、七月に行われます。" * 12)
    rows = [tokenizer(text).input_ids for text in texts]
    choices = ask_vllm(verified, "/v1/completions", {"prompt": rows, "prompt_logprobs": 0, "max_tokens": 1})["choices"]
    for choice, ids in zip(choices, rows, strict=True):
        pairs = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)  # nothing precedes the first token
        theirs = torch.tensor([entry[str(token)]["logprob"] for entry, token in pairs])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (theirs - ours).abs().max().item() < 1e-3
        assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=1e-5)


def test_an_untrained_merge_is_no_better_than_the_base(verified: Line):
    """Merged files that are served faithfully but hold no tune: only the comparison with the base finds it."""
    published = verified.store.committed(PublishedModel)[-1]
    served = serve_model(published, verified.recipe.serve, verified.store)
    assert served.reused  # the same model, command and settings: nothing is started again
    demanding = verified.recipe.verify.model_copy(update={"min_base_margin": 5.0})
    with pytest.raises(AttestationError, match="no better than its base"):
        verify_model(served, demanding, verified.store, lambda report, about: None)
