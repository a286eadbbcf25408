"""An answer of the real gateway leads back to the rows it was trained on, by the header that the client has."""

import json
import os
import subprocess
import sys

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore
from tasks.fetch.run import fetch_dataset
from tasks.specs import FetchSpec
from tests.chain import commit_base, commit_chain, commit_packed
from tests.deployments.gateway.conftest import ROOT, clean_environment
from tests.tiny import write_chats

DIGEST, RUN = "5a" * 32, "0190aaaa-bbbb-7ccc-8ddd-eeeeffff0000"


def test_from_the_request_id_of_an_answer_to_its_data_rows(tmp_path, upstream, start_gateway):
    store = ArtifactStore(tmp_path / "home")
    spec = FetchSpec(source=str(write_chats(tmp_path / "chats.jsonl", 20)), validation_pct=30.0)
    dataset = fetch_dataset(spec, store, HfApi(token=False))
    base = commit_base(store)
    packed = commit_packed(store, dataset, base)
    served = commit_chain(store, packed, base, tmp_path, digest=DIGEST, url="http://127.0.0.1:1")
    (store.root / "runs" / RUN).mkdir(parents=True)
    (store.root / "runs" / RUN / "recipe.json").write_text('{"recipe": "tiny", "resolved": {}}')

    gateway = start_gateway(upstream.port, TATARA_MODEL_DIGEST=DIGEST, TATARA_RUN_ID=RUN)
    status, headers, answer = gateway.chat()
    assert status == 200 and headers["x-tatara-model-digest"] == DIGEST
    gateway.trace(headers["x-request-id"])  # wait for it

    environment = clean_environment(TATARA_HOME=store.root, FILE_QUEUE_PATH=gateway.queue)
    for wanted in (headers["x-request-id"], answer["id"]):
        argv = [sys.executable, "-m", "deployments.cli", "provenance", wanted, "--json"]
        done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["trace"]["model_digest"] == DIGEST and found["run"]["recipe"] == "tiny"
        assert found["made_of"][0]["ref"] == served.ref
        assert len(found["data_rows"][dataset.ref]["train"]) == dataset.num_train_rows
    assert os.fspath(gateway.queue) in found["trace"]["place"]
