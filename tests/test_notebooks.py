"""The notebooks: nothing in them but code, and all of their code runs, as a person on Colab would run it."""

import ast
import inspect
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.notebook_settings import SETTINGS
from tasks.checkpoints import is_complete
from tasks.files import digest
from tasks.metrics import read_metrics
from tasks.procfs import read_start_ticks
from tests import notebooks as subject
from tests.hub_server import (
    READ,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)
from tests.needs import lack
from tests.tasks.check.test_fit import dense, put_headers
from tests.tasks.check.test_session import NVIDIA_SMI
from tests.tiny import save_dense_model, write_chats
from tests.waiting import wait_for

pytestmark = pytest.mark.long

COLAB, WALK = "finetune_colab.ipynb", "walkthrough.ipynb"
FINAL = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}
SAVE_STEPS, NUM_STEPS = 5, 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a training that takes seconds: a tiny dense base, and chats or texts."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [
        {"text": f"The smith of village {n} has {n * 7 % 13} hammers and sings. " * (1 + n % 5)} for n in range(80)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return {
        "PROJECT_NAME": "tiny",
        "BASE_MODEL_ID": str(save_dense_model(folder / "base")),
        "DATASET_ID": str(write_chats(folder / "chats.jsonl", 80)),
        "MAX_SEQ_LENGTH": 128,
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "LORA_R": 4,
        "LEARNING_RATE": 1e-2,
        "WARMUP_STEPS": 1,
        "SAVE_STEPS": SAVE_STEPS,
        "MAX_STEPS": 6,
        "CHANGES": {"train": {"dtype": "float32"}},
    }


def variables(settings: dict[str, Any], folder: Path, **more: str) -> dict[str, str]:
    """What a session sees: its settings, a home of its own, a Drive below `folder`."""
    drive = {"BASE_SAVE_DIR": str(folder / "drive")}
    home = {"HOME": str(folder / "home"), "TMPDIR": str(folder), "FILE_QUEUE_PATH": str(folder / "traces.jsonl")}
    return {"TATARA_NOTEBOOK_SETTINGS": json.dumps(settings | drive), **home, **more}


def run(settings: dict[str, Any], folder: Path, **more: str) -> tuple[int, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subject.run(COLAB, variables(settings, folder, **more), folder / "said.log")


def gain(said: str) -> float:
    """What the validation loss fell by, as the notebook says it."""
    before, after = re.findall(r"^validation loss ([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)[-1]
    return float(before) - float(after)


def adapter_digest(folder: Path) -> str:
    return digest(folder / "drive/tiny/final/adapter_model.safetensors")


@pytest.mark.parametrize("name", [COLAB, WALK])
def test_a_notebook_is_plain_python_without_outputs_and_tokens(name: str):
    text = (subject.NOTEBOOKS / name).read_text()
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", text)
    for cell in subject.cells(name):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        ast.parse("".join(cell["source"]))  # no ! and no %


def test_every_setting_is_in_the_one_cell_and_in_the_docs():
    calls = (node for cell in subject.cells(COLAB) for node in ast.walk(ast.parse("".join(cell["source"]))))
    [names] = [
        [word.arg for word in node.keywords]
        for node in calls
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"
    ]
    assert names == list(SETTINGS)
    told = re.findall(r"^\| `([A-Z0-9_]+)` \|", (subject.ROOT / "docs/colab.md").read_text(), re.MULTILINE)
    assert told == names


def _calls_of_ours(tree: ast.Module) -> Iterator[tuple[Any, ast.Call]]:
    """Each call of a function that the code imports from this repository."""
    rooms, ours = ("tasks", "flows", "blocks", "deployments"), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in rooms:
            ours |= {name.name: getattr(import_module(node.module), name.name) for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours:
            yield ours[node.func.id], node


@pytest.mark.parametrize("name", [COLAB, WALK])
def test_a_call_of_ours_has_the_arguments_that_the_function_takes(name: str):
    """Notebooks are outside of pyright, and not every branch of theirs is run here."""
    code = "\n".join("".join(cell["source"]) for cell in subject.cells(name))
    calls = list(_calls_of_ours(ast.parse(code)))
    for function, call in filter(lambda found: inspect.isfunction(found[0]), calls):  # no classes
        words = {word.arg: None for word in call.keywords if word.arg}
        try:
            inspect.signature(function).bind(*call.args, **words)
        except TypeError as error:
            pytest.fail(f"{ast.unparse(call)}: {error}")
    assert len(calls) >= 5


def test_asking_needs_sections_1_to_3_alone(tmp_path: Path):
    """As its text says: in a new session a person asks `final/` without the data and the training."""
    cells, sections = json.loads((subject.NOTEBOOKS / COLAB).read_text())["cells"], dict[str, list[str]]()
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (head := re.match(r"## (\d)", text)):
            sections[head[1]] = []
        elif cell["cell_type"] == "code":
            sections[list(sections)[-1]].append(text)
    path = tmp_path / "ask.py"
    path.write_text("\n".join(text for number in "1237" for text in sections[number]))
    argv = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", str(path)]
    told = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_texts_go_from_the_settings_to_an_answer_and_run_all_again_trains_nothing(
    inputs: dict[str, Any], tmp_path: Path
):
    texts = inputs["DATASET_ID"].replace("chats", "texts")
    settings = {**inputs, "DATASET_ID": texts, "TEXT_COLUMN": "text"}
    code, said = run(settings, tmp_path)
    assert code == 0, said
    assert "as nf4" in said and "fits: yes" in said
    assert re.search(r"--- what is given ---\n\n--- what is learnt ---\nThe smith of village 0 has 0 hammers", said)
    assert gain(said) > 0.05
    assert "completion: " in said and "chat: " in said and "nothing was pushed" in said
    project = tmp_path / "drive/tiny"
    assert {path.name for path in (project / "final").iterdir()} >= FINAL
    assert json.loads((project / "recipe.json").read_text())["resolved"]["pack"]["loss_on"] == "all"
    before = adapter_digest(tmp_path)
    code, said = run(settings, tmp_path)
    assert code == 0, said
    assert said.count("skipped: ") >= 4 and "step 1/6" not in said and "completion: " in said
    assert adapter_digest(tmp_path) == before


@pytest.mark.chaos
def test_chats_without_quantisation(inputs: dict[str, Any], tmp_path: Path):
    code, said = run({**inputs, "USE_4BIT": False}, tmp_path)
    assert code == 0, said
    assert "<|start|>user<|message|>q0?<|end|><|start|>assistant" in said
    assert gain(said) > 0.05
    walked, told = subject.run(WALK, {"TATARA_HOME": str(tmp_path / "drive/tiny")}, tmp_path / "walk.log")
    assert walked == 0, told
    assert re.search(r"adapter +[0-9a-f]{8} .* trainable, validation loss 5\.\d+ -> 5\.", told)
    assert "nothing was merged in this run" in told and "nothing was served in this run" in told
    assert "0 traces wait in the queue" in told


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_the_tiny_base_is_made_by_its_name_alone(tmp_path: Path):
    """As a person without a GPU sets it, all else as it stands in the cell: made, tuned on the shipped chats, asked."""
    settings = {"BASE_MODEL_ID": "pretrain:tiny", "USE_4BIT": False, "MAX_STEPS": 6}
    code, said = subject.run(COLAB, variables(settings, tmp_path), tmp_path / "said.log", timeout_s=840)
    assert code == 0, said
    assert "step 360/360" in said and "step 6/6" in said and abs(gain(said)) < 0.5
    assert "completion: " in said and "chat: " in said and "HUB_REPO_ID is empty" in said
    assert {path.name for path in (tmp_path / "drive/my-first-adapter/final").iterdir()} >= FINAL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TEXT_COLUMN": "txt"}, r"DataError: .*: no column 'txt'; the row has messages"),
        ({"LORA_RR": 4}, r"SpecError: there is no setting LORA_RR: did you mean LORA_R"),
        ({"LORA_TARGET_MODULES": ["q_prj"]}, r"SpecError: .* 'q_prj' hits nothing; did you mean q_proj"),
        ({"WARMUP_STEPS": 100}, r"SpecError: TrainSpec.warmup_steps = 100 but the run has 6 optimizer steps"),
    ],
    ids=["column", "name", "target", "warmup"],
)
def test_a_wrong_setting_ends_the_run_with_its_name_and_the_way_out(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
):
    code, said = run({**inputs, **changes}, tmp_path)
    assert code == 1
    assert re.search(message, said.splitlines()[-1]), said
    assert not list((tmp_path / "drive").rglob("adapter_model.safetensors"))


@pytest.mark.skipif(Path("/content/tatara").exists(), reason="this is Colab")
def test_on_colab_the_address_of_the_copy_is_asked_for_before_anything(inputs: dict[str, Any], tmp_path: Path):
    """Else git says 128, and no more. google.colab is a stand-in: it is there, and that is all."""
    (tmp_path / "google/colab").mkdir(parents=True)
    (tmp_path / "google/colab/__init__.py").touch()
    code, said = run(inputs, tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert said.splitlines()[-1].startswith("put the address of your copy of Tatara into `repository`")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has its GPU")
def test_a_gpu_that_torch_can_not_use_ends_the_first_section(inputs: dict[str, Any], tmp_path: Path):
    """An older driver than the CUDA of the pinned torch: else the CPU would train 7 B, without a word."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI.format(name="Tesla T4", capability="7.5"))
    (tmp_path / "nvidia-smi").chmod(0o755)
    code, said = run(inputs, tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert code == 1
    assert "Tesla T4: 15.7 of 16.1 GB free\n" in said and "can't use this GPU" in said.splitlines()[-1]


def on_hub(hub: HubServer) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}


def test_without_room_for_the_base_it_ends_before_the_download(inputs: dict[str, Any], tmp_path: Path, hub: HubServer):
    name = "Qwen/Qwen1.5-110B-Chat"
    put_headers(hub, name, *dense(name))
    code, said = run({**inputs, "BASE_MODEL_ID": name}, tmp_path, **on_hub(hub))
    assert code == 1 and "no GPU: choose one in Runtime > Change runtime type" in said
    assert "CapacityError: tiny on no GPU: the host's memory, " in said
    assert re.search(r"fits: no\nnothing that was tried fits", said)
    assert not list((tmp_path / "drive").rglob("train.parquet"))


@pytest.mark.slow
def test_a_gated_base_asks_for_a_token_with_hidden_input_and_keeps_it_nowhere(
    inputs: dict[str, Any], tmp_path: Path, hub: HubServer
):
    base = Path(inputs["BASE_MODEL_ID"])
    hub.add_repo("model", "ada/base", {path.name: path.read_bytes() for path in base.iterdir()})
    hub.repos["model", "ada/base"].gated = True
    settings = {**inputs, "BASE_MODEL_ID": "ada/base", "MAX_STEPS": 2}
    elsewhere = {"TATARA_MODELS": str(tmp_path / "models")}
    ours, theirs = pty.openpty()
    process = subject.start(COLAB, variables(settings, tmp_path, **on_hub(hub), **elsewhere), tmp_path / "said", theirs)
    try:
        wait_for(lambda: "Hugging Face token (hidden)" in (tmp_path / "said").read_text(), 60)
        time.sleep(0.2)  # the prompt comes before the echo is off
        os.write(ours, f"{READ}\n".encode())
        code = process.wait(200)
        shown = os.read(ours, 4096) if select.select([ours], [], [], 0)[0] else b""  # what a terminal echoes
    finally:
        process.kill()
        os.close(theirs)
        os.close(ours)
    said = (tmp_path / "said").read_text()
    assert code == 0, said
    assert "a Hugging Face token is needed: model ada/base@main" in said
    assert READ not in said and READ.encode() not in shown
    written = [path for path in tmp_path.rglob("*") if path.is_file() and READ.encode() in path.read_bytes()]
    assert written == []
    assert list((tmp_path / "models").glob("*/model.safetensors"))
    assert not list((tmp_path / "drive/tiny/base").rglob("*.safetensors"))


@pytest.mark.chaos
def test_the_stop_button_leaves_a_checkpoint_of_the_step_that_ran(inputs: dict[str, Any], tmp_path: Path):
    project = tmp_path / "drive/tiny"
    settings = {**inputs, "MAX_STEPS": NUM_STEPS, "SAVE_STEPS": NUM_STEPS}
    kernel = subject.start(COLAB, variables(settings, tmp_path), tmp_path / "said.log")
    folder = wait_for_step(project, 7)
    kernel.send_signal(signal.SIGINT)
    assert kernel.wait(60) != 0
    reached = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 7 <= reached < NUM_STEPS
    assert is_complete(folder / f"checkpoints/checkpoint-{reached}")
    assert read_start_ticks(json.loads((folder / "process.json").read_text())["pid"]) is None


@pytest.fixture(scope="module")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that takes locks, links, modes and folder syncs away below $DRIVE."""
    if shutil.which("cc") is None:
        lack("no C compiler: apt-get install gcc")
    made = tmp_path_factory.mktemp("fuse") / "drive.so"
    source = Path(__file__).with_name("drive.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"], check=True)
    return str(made)


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of a run that nobody cut."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = run({**inputs, "MAX_STEPS": NUM_STEPS}, folder)
    assert code == 0, said
    return adapter_digest(folder)


def wait_for_step(project: Path, step: int) -> Path:
    """Return the adapter's folder once that step was logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for folder in project.glob("adapter/*"):
            records = read_metrics(folder / "metrics.jsonl")
            if records and records[-1]["step"] >= step:
                return folder
        time.sleep(0.005)
    raise AssertionError("no such step")


@pytest.mark.chaos
@pytest.mark.parametrize("disk", ["plain", "fuse"])
def test_a_session_that_is_cut_goes_on_elsewhere_with_run_all_and_loses_at_most_save_steps(
    inputs: dict[str, Any], whole: str, fuse: str, tmp_path: Path, disk: str
):
    """SIGKILL to all of it, as when Colab takes the machine away; the next machine has another boot id, and our pid."""
    settings, project = {**inputs, "MAX_STEPS": NUM_STEPS}, tmp_path / "drive/tiny"
    project.mkdir(parents=True)
    like_drive = {"LD_PRELOAD": fuse, "DRIVE": str(project)} if disk == "fuse" else {}
    kernel = subject.start(COLAB, variables(settings, tmp_path, **like_drive), tmp_path / "cut.log")
    folder = wait_for_step(project, 17)
    identity = json.loads((folder / "process.json").read_text())
    for pid in (kernel.pid, identity["pid"]):
        os.killpg(pid, signal.SIGKILL)
    kernel.wait(30)
    reached = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 17 <= reached < NUM_STEPS, (tmp_path / "cut.log").read_text()
    saved = max(
        int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/checkpoint-*") if is_complete(path)
    )
    assert reached - saved <= SAVE_STEPS
    ours = {"pid": os.getpid(), "started": read_start_ticks(os.getpid()), "boot_id": "another", "host": "another"}
    (folder / "process.json").write_text(json.dumps({**identity, **ours}))
    elsewhere = {"HOME": str(tmp_path / "elsewhere"), "TMPDIR": "/tmp", **like_drive}
    code, said = subject.run(COLAB, variables(settings, tmp_path) | elsewhere, tmp_path / "again.log")
    assert code == 0, said
    assert f"resuming from checkpoint-{saved}" in said
    assert f"step {saved + 1}/{NUM_STEPS}" in said and f"step {saved}/{NUM_STEPS}" not in said
    assert adapter_digest(tmp_path) == whole
    assert ("a disk without locks" in said) is (disk == "fuse")
    assert not list(project.rglob("*.partial"))
