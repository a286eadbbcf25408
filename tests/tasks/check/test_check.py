"""What can't work is said in the first seconds, all of it at once, with the value and the way out."""

import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session

from flows.recipes import pretrain_compact_1b4, pretrain_tiny
from tasks import errors
from tasks.artifacts import ArtifactStore, TrainedAdapter, make_key
from tasks.check import run as subject
from tasks.fetch.run import fetch_base, fetch_dataset
from tasks.pack.run import pack_dataset
from tasks.specs import BaseModelSpec, FetchSpec, LoraSpec, Recipe, ServeSpec, TrainSpec, change
from tasks.train.run import VERSION
from tests.ports import free_port
from tests.tiny import save_model, write_chats

HUB = HfApi(token=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


@pytest.fixture
def recipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe without a fault."""
    monkeypatch.setenv("TATARA_VLLM_PYTHON", sys.executable)
    vllm, gateway = free_port(), free_port()
    return Recipe(
        base=BaseModelSpec(model=str(base)),
        fetch=FetchSpec(source=str(write_chats(tmp_path / "chats.jsonl", 60)), validation_pct=20),
        pack={"row_tokens": 256},  # pyright: ignore[reportArgumentType]
        train=TrainSpec(lora=LoraSpec(target_modules=("q_proj",))),
        serve=ServeSpec(vllm_port=vllm, gateway_port=gateway, max_model_len=512),
    )


def test_good_recipe_is_told_line_by_line(recipe: Recipe, store: ArtifactStore, base: Path):
    said = subject.check_recipe(recipe, None, store, HUB)
    told = ["data", "base", "adapter", "room", "memory", "publish", "serve", "disk"]
    assert [line.partition(":")[0] for line in said] == told
    assert said[0].endswith(" train and 9 validation rows")
    assert said[1] == f"base: {base}"
    assert "stays in a local folder" in said[5]
    assert re.search(
        r"training takes .* about 0\.5 GB \(.*workspace 0\.5.*\), \d+\.\d GB of memory are available", said[4]
    )


def test_pretrained_base_is_checked_from_its_shape(recipe: Recipe, store: ArtifactStore):
    tiny = change(recipe, {"base": {"model": "pretrain:tiny"}})
    assert subject.check_recipe(tiny, pretrain_tiny(), store, HUB)[1].endswith(", made here of corpus shipped, 0.3 MB")
    with pytest.raises(
        errors.SpecError, match=r"row_tokens = 4096 but the base's context is 2048 tokens: lower row_token"
    ):
        subject.check_recipe(change(tiny, {"pack": {"row_tokens": 4096}}), pretrain_tiny(), store, HUB)


def _missing(folder: Path) -> str:
    return str(folder / "no.txt")


def _short(folder: Path) -> str:
    (folder / "short.txt").write_text("too short")
    return str(folder / "short.txt")


def _of_other_columns(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"body": "%s"}\n' % ("text " * 2000))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (_missing, r"corpus .*no\.txt is not there"),
        (_short, r"short\.txt has 9 bytes, less than a row of 1024 tokens"),
        (_of_other_columns, r"rows\.jsonl:1\): there is no column 'text' \(it has: body\)"),
    ],
)
def test_a_corpus_that_no_base_can_be_made_of_is_said(
    recipe: Recipe, store: ArtifactStore, tmp_path: Path, corpus: Callable[[Path], str], message: str
):
    made = change(recipe, {"base": {"model": "pretrain:compact_1b4"}})
    pretraining = change(pretrain_compact_1b4(), {"corpus": corpus(tmp_path)})
    with pytest.raises(errors.TataraError, match=message):
        subject.check_recipe(made, pretraining, store, HUB)
    assert not list(store.root.glob("corpus/*"))


def test_a_pretraining_that_can_not_be_is_said_before_its_corpus_is_tokenised(store: ArtifactStore):
    huge = {"shape": {"num_layers": 200, "num_experts": 512}, "corpus": "short_english"}
    with pytest.raises(errors.CapacityError, match=r"pretraining needs about .* GB"):
        subject.check_pretrain(change(pretrain_compact_1b4(), huge), store, HUB)
    with pytest.raises(errors.SpecError, match=r"kernels = 'fused' needs .* compact_vocabulary off"):
        subject.check_pretrain(change(pretrain_tiny(), {"kernels": "fused"}), store, HUB)
    said = subject.check_pretrain(pretrain_tiny(), store, HUB)
    assert "corpus: " in said[0] and "pretraining takes about" in said[1]
    assert not list(store.root.glob("corpus/*"))


def test_chats_for_a_base_that_can_not_chat_are_refused(recipe: Recipe, store: ArtifactStore):
    own = change(pretrain_tiny(), {"tokenizer": "train"})
    tiny = change(recipe, {"base": {"model": "pretrain:tiny"}})
    with pytest.raises(errors.SpecError, match=r"FetchSpec gives chats, but .*tokenizer = 'train'.* /v1/completions"):
        subject.check_recipe(tiny, own, store, HUB)


def _rows(text: str) -> Callable[[Path], dict[str, Any]]:
    def changes(folder: Path) -> dict[str, Any]:
        (folder / "bad.jsonl").write_text(text)
        return {"fetch": {"source": str(folder / "bad.jsonl")}}

    return changes


def _torn_base(folder: Path) -> dict[str, Any]:
    weights = save_model(folder / "torn") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    return {"base": {"model": str(folder / "torn")}}


QUESTION_ONLY = json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n"


@pytest.mark.parametrize(
    ("changes", "cls", "message"),
    [
        (lambda f: {"fetch": {"source": f"{f}/no.jsonl"}}, errors.MissingError, r"data file .*/no\.jsonl is not there"),
        (_rows(""), errors.DataError, r"bad\.jsonl is empty: expected at least one row"),
        (_rows(QUESTION_ONLY), errors.DataError, r"bad\.jsonl:1: the chat has no answer: .*\): mend them, or raise"),
        (_rows('{"messages": '), errors.CorruptError, r"bad\.jsonl:1 is not JSON \(.*mend or delete that line"),
        (_rows('{"q": "a"}\n'), errors.DataError, r"bad\.jsonl:1: no column 'messages'; the row has q"),
        (lambda f: {"pack": {"row_tokens": 1024}}, errors.SpecError, r"row_tokens = 1024 but the .* is 512 tokens"),
        (lambda f: {"train": {"max_steps": 5, "warmup_steps": 5}}, errors.SpecError, r"raise max_steps"),
        (
            lambda f: {"train": {"lora": {"target_modules": ("q_porj",)}}},
            errors.SpecError,
            r"'q_porj' hits nothing; did you mean q_proj.*existing names end in k_proj, o_proj, q_proj",
        ),
        (
            lambda f: {"base": {"model": f"{f}/nobase"}},
            errors.MissingError,
            r"base model .*/nobase has no config\.json: name a Hub id or a transformers model folder",
        ),
        (lambda f: {"serve": {"max_model_len": 4096}}, errors.SpecError, "max_model_len = 4096 .* is 512: lower it"),
        (
            lambda f: {"serve": {"max_model_len": 256}},
            errors.SpecError,
            r"max_model_len = 256 but a row holds 256 tokens, and verify asks .*: raise max_model_len or",
        ),
        (lambda f: {"train": {"attention": "sdpa"}}, errors.SpecError, r"'sdpa' drops the sinks of gpt-oss: use"),
        (lambda f: {"train": {"lora": {"target_modules": ("router",)}}}, errors.SpecError, r"'router' hits nothing"),
        (
            lambda f: {"train": {"offload_layers": 1}},
            errors.SpecError,
            r"offload_layers = 1 but the lowest adapter sits in layer 0 of \d+: only layers below it can rest",
        ),
        (_torn_base, errors.CorruptError, r"model\.safetensors has \d+ bytes but its header describes \d+: download"),
    ],
)  # fmt: skip
def test_each_fault_is_said_with_value_and_way_out(
    recipe: Recipe, store: ArtifactStore, tmp_path: Path, changes: Any, cls: type[Exception], message: str
):
    with pytest.raises(cls, match=message):
        subject.check_recipe(change(recipe, changes(tmp_path)), None, store, HUB)


def test_taken_port_is_named(recipe: Recipe, store: ArtifactStore):
    with socket.socket() as other:
        other.bind(("127.0.0.1", recipe.serve.gateway_port))
        other.listen()
        with pytest.raises(
            errors.PortTakenError,
            match=rf"port {recipe.serve.gateway_port} for gateway is taken by .*: end it, or choose",
        ):
            subject.check_recipe(recipe, None, store, HUB)


def test_a_gateway_that_would_not_start_or_not_answer_verify_is_said(
    recipe: Recipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
):
    public = change(recipe, {"serve": {"host": "0.0.0.0"}})
    with pytest.raises(
        errors.SpecError, match=r"host = '0\.0\.0\.0' can be reached from outside, .* GATEWAY_KEYS_FILE"
    ):
        subject.check_recipe(public, None, store, HUB)
    monkeypatch.setenv("GATEWAY_KEYS_FILE", "/keys.jsonl")
    with pytest.raises(errors.SpecError, match=r"GATEWAY_KEYS_FILE is set, .* and TATARA_GATEWAY_KEY is not: make one"):
        subject.check_recipe(public, None, store, HUB)
    monkeypatch.setenv("TATARA_GATEWAY_KEY", "tatara_x")
    assert subject.check_recipe(public, None, store, HUB)


def test_missing_vllm_is_named(recipe: Recipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TATARA_VLLM_PYTHON", "/not/there/python")
    with pytest.raises(errors.SpecError, match=r"vLLM's environment is not there \(/not/there/python\): make it with"):
        subject.check_recipe(recipe, None, store, HUB)


def test_little_disk_is_said_with_numbers(recipe: Recipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "_MIN_FREE_BYTES", 10**18)
    with pytest.raises(errors.CapacityError, match=r"only \d+\.\d GB are free below .*, expected at least 1000000000\.0 GB: free"):  # fmt: skip  # noqa: E501
        subject.check_recipe(recipe, None, store, HUB)


def test_several_faults_are_listed_together(recipe: Recipe, store: ArtifactStore, tmp_path: Path):
    faulty = change(
        recipe, {"fetch": {"source": f"{tmp_path}/no.jsonl"}, "train": {"lora": {"target_modules": ("q_porj",)}}}
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", recipe.serve.vllm_port))
        other.listen()
        with pytest.raises(errors.SpecError) as caught:
            subject.check_recipe(faulty, None, store, HUB)
    assert str(caught.value).startswith("3 faults: ")
    faults = str(caught.value).removeprefix("3 faults: ").split(" | ")
    assert ["no.jsonl" in faults[0], "q_porj" in faults[1], str(recipe.serve.vllm_port) in faults[2]] == [True] * 3


def test_names_of_wrong_form_are_said_together(recipe: Recipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_REPO_NAME", "no-owner")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    faulty = change(recipe, {"base": {"model": "a/b/c"}, "fetch": {"source": "data.json"}})
    with pytest.raises(errors.SpecError) as caught:
        subject.check_recipe(faulty, None, store, HUB)
    faults = str(caught.value).removeprefix("3 faults: ").split(" | ")
    assert ["data.json" in faults[0], "model a/b/c@main: that is no name of a Hub repository" in faults[1]] == [
        True
    ] * 2
    assert faults[2] == "HF_REPO_NAME = 'no-owner' is not owner/name: put its owner in front"


@pytest.mark.parametrize("model", ["pretrain:", "", " "])
def test_a_base_without_a_name_is_refused(recipe: Recipe, model: str):
    with pytest.raises(errors.SpecError, match=r"Recipe\.base\.model = .*: it names no model: give a Hub id, a folder"):
        change(recipe, {"base": {"model": model}})


class _Hub(BaseHTTPRequestHandler):
    """A stand-in for huggingface.co, which is not ours: one status for each path."""

    answers: dict[str, tuple[int, Any]]

    def do_GET(self) -> None:
        known = next((answer for path, answer in self.answers.items() if self.path.startswith(path)), (404, {}))
        status, body = known
        data = json.dumps(body).encode()
        self.send_response(status)
        if isinstance(body, dict) and "code" in body:
            self.send_header("X-Error-Code", body["code"])
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HfApi]]:
    """Make a client of a Hub on loopback that gives the stated answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    servers: list[ThreadingHTTPServer] = []

    def open_hub(answers: dict[str, tuple[int, Any]]) -> HfApi:
        handler = type("Handler", (_Hub,), {"answers": answers})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_" + "x" * 34)

    yield open_hub
    for server in servers:
        server.shutdown()
        server.server_close()
    close_session()


def _to_hub(recipe: Recipe) -> Recipe:
    return change(recipe, {"publish": {"repo_id": "ayu/tuned"}})


@pytest.mark.parametrize(
    ("status", "cls", "message"),
    [
        (
            401,
            errors.AccessError,
            "checking the Hub token for ayu/tuned: 401, the token is wrong or expired; make a new one",
        ),
        (
            403,
            errors.AccessError,
            "checking the Hub token for ayu/tuned: 403, the token is valid but lacks this right; it needs write",
        ),
    ],
)
def test_wrong_token_and_missing_right_are_told_apart(
    recipe: Recipe, store: ArtifactStore, hub: Any, status: int, cls: type[Exception], message: str
):
    with pytest.raises(cls, match=message):
        subject.check_recipe(_to_hub(recipe), None, store, hub({"/api/whoami-v2": (status, {})}))


def test_token_is_asked_for_its_owner_only_when_a_repo_is_named(
    recipe: Recipe, store: ArtifactStore, hub: Any, monkeypatch: pytest.MonkeyPatch
):
    client = hub({"/api/whoami-v2": (200, {"name": "ayu"})})

    def said_of_publishing(recipe: Recipe, client: HfApi) -> str:
        return subject.check_recipe(recipe, None, store, client)[5]

    assert said_of_publishing(_to_hub(recipe), client) == "publish: merged as ayu to ayu/tuned"
    assert "no Hub repo is given" in said_of_publishing(recipe, client)
    assert "no Hub token is given" in said_of_publishing(_to_hub(recipe), HUB)
    monkeypatch.setenv("HF_REPO_NAME", "ayu/other")
    assert said_of_publishing(recipe, client) == "publish: merged as ayu to ayu/other"


def test_hub_that_is_away_is_transient_and_hides_no_behind_other_faults(recipe: Recipe, store: ArtifactStore):
    port = free_port()
    faulty = change(recipe, {"fetch": {"source": "/no.jsonl"}, "base": {"model": "owner/name"}})
    constants_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    close_session()
    try:
        with pytest.raises(
            errors.TransientError, match=r"model owner/name@main: the Hub can't be reached \(.*online\?"
        ):
            subject.check_recipe(faulty, None, store, HfApi(endpoint=f"http://127.0.0.1:{port}", token=False))
    finally:
        constants.HF_HUB_OFFLINE = constants_offline
        close_session()


@pytest.mark.parametrize(
    ("answer", "cls", "message"),
    [
        ((404, {"code": "RepoNotFound"}), errors.MissingError, "model owner/name@main: 404, it does not exist"),
        (
            (404, {"code": "RevisionNotFound"}),
            errors.MissingError,
            "no such revision; name an existing branch, tag or com",
        ),
        ((403, {"code": "GatedRepo"}), errors.AccessError, "the repository is gated; accept its terms on its Hub page"),
        (
            (401, {"code": "RepoNotFound"}),
            errors.AccessError,
            "401, it is not there or this token may not see it; check",
        ),
    ],
)
def test_base_that_the_hub_does_not_give_is_named(
    recipe: Recipe, store: ArtifactStore, hub: Any, answer: Any, cls: type[Exception], message: str
):
    far = change(recipe, {"base": {"model": "owner/name"}})
    client = hub({"/api/whoami-v2": (200, {"name": "ayu"}), "/api/models/owner/name": answer})
    with pytest.raises(cls, match=message):
        subject.check_recipe(far, None, store, client)


def test_data_set_that_the_hub_does_not_have_is_named(recipe: Recipe, store: ArtifactStore, hub: Any):
    far = change(recipe, {"fetch": {"source": "owner/data"}})
    client = hub(
        {"/api/whoami-v2": (200, {"name": "ayu"}), "/api/datasets/owner/data": (404, {"code": "RepoNotFound"})}
    )
    with pytest.raises(errors.MissingError, match="dataset owner/data@main: 404, it does not exist"):
        subject.check_recipe(far, None, store, client)


def test_an_adapter_that_is_whole_needs_no_cluster_any_more(recipe: Recipe, store: ArtifactStore):
    """Trained on a cluster that is gone, it still goes on to merge and publish."""
    launch = {"launcher": "ray", "nodes": 2, "ray_address": f"http://127.0.0.1:{free_port()}"}
    recipe = change(recipe, {"train": {"launch": launch, "gradient_accumulation": 2}})
    base = fetch_base(recipe.base, store, HUB)
    packed = pack_dataset(fetch_dataset(recipe.fetch, store, HUB), base, recipe.pack, store)
    with pytest.raises(errors.UnavailableError, match="127"):
        subject.check_recipe(recipe, None, store, HUB)
    with store.claim(TrainedAdapter, make_key("train", VERSION, recipe.train, {}, (packed, base))) as claim:
        losses = dict.fromkeys(("first_loss", "last_loss", "validation_loss_before", "validation_loss_after"), 2.0)
        adapter = TrainedAdapter(
            key=claim.key,
            folder=str(claim.folder),
            parents=(packed.ref, base.ref),
            adapter_folder=str(claim.folder / "adapter"),
            adapter_digest="d" * 64,
            base_folder=base.model_folder,
            base_digest=base.model_digest,
            num_steps=1,
            num_trainable=64,
            **losses,
        )
        claim.commit(adapter, spec=recipe.train)
    said = subject.check_recipe(recipe, None, store, HUB)
    assert f"launch: not needed, adapter/{adapter.short} is whole" in said and "memory: trained before" in said
    here = change(recipe, {"train": {"launch": {"launcher": "slurm"}}})  # where it runs decides nothing
    assert subject.check_recipe(here, None, store, HUB) == said
    other = change(recipe, {"fetch": {"validation_pct": 30}})  # other data: another adapter, to be trained
    with pytest.raises(errors.UnavailableError, match="127"):
        subject.check_recipe(other, None, store, HUB)
    shutil.rmtree(packed.path)
    assert subject.check_recipe(recipe, None, store, HUB) == said


def test_recipe_is_kept_as_it_was_resolved(recipe: Recipe, tmp_path: Path):
    path = subject.keep_recipe("mine", recipe, tmp_path / "runs/1")
    kept = json.loads(path.read_text())
    assert kept["recipe"] == "mine"
    assert Recipe.model_validate(kept["resolved"]) == recipe
