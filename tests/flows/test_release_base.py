"""A model that was pretrained here, with a vocabulary of its own, behind a real vLLM and gateway.

Published, served and verified by the flow `release-base`; random weights in its place are refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from deployments.generate import local, remote
from deployments.generate.wish import Told, Wish
from flows.recipes import resolve, resolve_base_release
from tasks.artifacts import ArtifactStore, HealthReport, PretrainedModel, PublishedModel
from tasks.errors import AttestationError, ServiceError
from tasks.fetch.run import fetch_dataset
from tasks.merge.run import merge_adapter
from tasks.pack.run import pack_dataset
from tasks.publish.run import publish_model
from tasks.serve import services
from tasks.serve.run import serve_model
from tasks.serve.settings import ServiceSettings
from tasks.specs import BaseRelease, PublishSpec, change
from tasks.train.run import train_adapter
from tasks.verify.client import post_json
from tasks.verify.run import verify_model
from tests.flows.line import ROOT, need_vllm, serve_unchecked
from tests.ports import free_port
from tests.pretrained import SENTENCES, make_pretrained

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
_RUN = """
import json, sys
from prefect.testing.utilities import prefect_test_harness
from flows.release_base import release_base
with prefect_test_harness(server_startup_timeout=120):
    report = release_base("compact_1b4", sys.argv[1], json.loads(sys.argv[2]))
"""


@dataclass(frozen=True)
class Released:
    """A store with a pretrained model, and what changes its release for this machine."""

    store: ArtifactStore
    model: PretrainedModel
    release: BaseRelease

    @property
    def published(self) -> PublishedModel:
        return self.store.committed(PublishedModel)[0]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    need_vllm()
    folder = tmp_path_factory.mktemp("base")
    store = ArtifactStore(folder / "home")
    model = make_pretrained(store)
    serve = {"vllm_port": free_port(), "gateway_port": free_port(), "max_model_len": 256, "dtype": "float32"}
    changes = {"serve": {**serve, "max_num_seqs": 8, "cpu_kv_cache_bytes": 64 << 20}}
    release = resolve_base_release("compact_1b4", changes)
    env = {**os.environ, "TATARA_HOME": str(store.root), "FILE_QUEUE_PATH": str(folder / "traces.jsonl")}
    env |= {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _RUN, model.short, json.dumps(changes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        yield Released(store, model, release)
    finally:
        services.stop(ServiceSettings(model="", spec=release.serve, home=store.root))


def test_the_flow_proves_that_the_files_are_served_and_were_trained(released: Released):
    report = released.store.committed(HealthReport)[0]
    assert report.passed and report.num_answers == 16 and report.num_greedy_tokens > 0
    assert abs(report.served_logprob - report.merged_logprob) < 1e-4 and report.token_gap < 1e-3
    assert report.served_logprob > report.base_logprob + 4  # random weights say log(1/512)
    about = (released.store.manifest(HealthReport, report.key) or {})["about"]
    assert about["chat"]["contract"] == "completions" and about["chat"]["num_stream_pieces"] > 0
    assert {path: reply[:3] for path, reply in about["chat"]["not_served"].items()} == {
        "/v1/chat/completions": "400",
        "/v1/generate": "400",
    }


def test_chat_is_refused_and_completions_answer(released: Released):
    url, name = (
        f"http://127.0.0.1:{released.release.serve.gateway_port}",
        released.release.serve.served_model_name,
    )
    with pytest.raises(ServiceError, match="answered 400"):
        chat = {"model": name, "messages": [{"role": "user", "content": "GPT"}]}
        post_json(f"{url}/v1/chat/completions", chat, 60)
    body = {"model": name, "prompt": "Old smiths", "max_tokens": 12, "temperature": 0}
    assert f"Old smiths{post_json(f'{url}/v1/completions', body, 60)['choices'][0]['text']}" in SENTENCES


def test_generate_says_the_same_from_files_and_endpoint(released: Released):
    wish = Wish(prompt="GPT models", max_tokens=12, device="cpu", dtype="float32")
    told, told_there = Told(), Told()
    here = "".join(local.say(released.published.model_folder, wish, told))
    there = "".join(remote.say(f"http://127.0.0.1:{released.release.serve.gateway_port}", "latest", wish, told_there))
    assert f"GPT models{here}" in SENTENCES and here == there
    assert (told.num_tokens, told.num_prompt_tokens, told.stopped_by) == (
        told_there.num_tokens,
        told_there.num_prompt_tokens,
        told_there.stopped_by,
    )
    assert told.stopped_by == "eos"


def test_it_can_be_tuned_on_plain_text_and_is_verified_by_completions(released: Released, tmp_path: Path):
    """The line of `finetune` on a base whose tokenizer is not harmony's."""
    texts = [f"{who} {what}" for who in ("Iron sand", "Charcoal") for what in ("is hot.", "burns at night.", "glows.")]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts * 8))
    recipe = change(
        resolve("tiny"),
        {
            "fetch": {"source": str(tmp_path / "texts.jsonl"), "text_column": "text", "validation_pct": 20},
            "pack": {"row_tokens": 64},
            "train": {"max_steps": 20, "warmup_steps": 2, "learning_rate": 3e-2, "save_steps": 20},
            "serve": released.release.serve.model_dump(),
            "verify": {"question": "Iron sand", "max_answer_tokens": 8, "may_break_format": False},
        },
    )
    store, hub = released.store, HfApi(token=False)
    packed = pack_dataset(fetch_dataset(recipe.fetch, store, hub), released.model, recipe.pack, store)
    adapter = train_adapter(packed, released.model, recipe.train, store, lambda record: None)
    published = publish_model(merge_adapter(adapter, recipe.merge, store), recipe.publish, store, hub)
    served = serve_model(published, recipe.serve, store)
    report = verify_model(served, recipe.verify, store, lambda report, about: None)
    about = (store.manifest(HealthReport, report.key) or {})["about"]
    assert report.passed and about["chat"]["contract"] == "completions"
    assert report.served_logprob > report.base_logprob + 0.5


def test_random_weights_in_its_place_are_refused(released: Released):
    """Served by a deploy that does not look at the files; then as what was published, faithfully."""
    random = make_pretrained(released.store, num_steps=0)
    served = serve_unchecked(released.published, Path(random.model_folder), released.release.serve, released.store)
    with pytest.raises(AttestationError, match=r"is not the published one: .* It answers like random weights"):
        verify_model(served, released.release.verify, released.store, lambda report, about: None)
    published = publish_model(random, PublishSpec(), released.store, HfApi(token=False))
    served = serve_model(published, released.release.serve, released.store)
    with pytest.raises(AttestationError, match="is no better than random weights of its shape"):
        verify_model(served, released.release.verify, released.store, lambda report, about: None)
    assert [report.passed for report in released.store.committed(HealthReport)[-2:]] == [False, False]
