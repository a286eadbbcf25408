"""Who may import whom, which files are pure, and what a name may be: read from the source, never run."""

import ast
import re
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("flows", "tasks", "blocks", "deployments")
FILES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
VERBS = sorted(path.parent.name for path in (ROOT / "tasks").glob("*/task.py"))

# from file (pattern) -> modules of ours (pattern) that it may import; {verb} is the file's own verb.
# A file takes the first row that fits: handbook section 2, with the exceptions that exist, each named.
SHARED = r"tasks\.(adapters|artifacts|checkpoints|children|costs|divergence|environment|specs|errors|files|followed_job|hub|job_report|launch_script|lifeline|liveness|machine|metrics|model_config|models|pictures|processes|procfs|ranks|ray_cluster|ray_driver|ray_errors|ray_follow|ray_job|ray_jobs|ray_log|recorder|remote|remote_errors|remote_manifest|row_order|slurm|slurm_job|slurm_report|supervision|tables|targets|trainer_job|training)"  # noqa: E501
TABLE: list[tuple[str, str]] = [
    (r"flows/.*", r"flows\.(prefect_flow|recipes)|tasks\.\w+\.task|tasks\.(specs|artifacts|errors)|tasks\.traces\.spec"),  # noqa: E501
    (r"tasks/(?P<verb>train|reinforce|ppo|verify|evaluate)/task\.py", rf"blocks\..*|tasks\.{{verb}}\..*|{SHARED}|tasks\.prefect_ui|tasks\.serve\.handover"),  # who gets the GPU, who is served  # noqa: E501
    (r"tasks/(?P<verb>\w+)/task\.py", rf"blocks\..*|tasks\.{{verb}}\..*|{SHARED}|tasks\.prefect_ui"),
    (r"tasks/check/\w+\.py", rf"tasks\.(corpus|fetch|pack|pretrain|reinforce|train)\.run|tasks\.ppo\.(preflight|prepare)|tasks\.serve\.(handover|preflight|settings)|tasks\.train\.(needs|plan|weights)|tasks\.pack\.render|tasks\.check\.\w+|{SHARED}|tasks\.gptoss\.\w+"),  # looks into the others  # noqa: E501
    (r"tasks/evaluate/prompts\.py", rf"tasks\.evaluate\.\w+|tasks\.pack\.render|{SHARED}"),  # asks as training rendered
    (r"tasks/gptoss/\w+\.py", r"tasks\.(artifacts|costs|specs|errors|files)|tasks\.gptoss\.\w+"),
    (r"tasks/(?P<verb>\w+)/\w+\.py", rf"tasks\.{{verb}}\.\w+|{SHARED}|tasks\.gptoss\.\w+"),
    (r"tasks/targets\.py", r"tasks\.(errors|specs)|tasks\.gptoss\.layout"),  # what an adapter is put on
    (r"tasks/\w+\.py", SHARED),
    (r"blocks/(opening|storage)\.py", r"blocks\.\w+|tasks\.(artifacts|remote)"),  # they open the artifact store
    (r"blocks/\w+\.py", r"blocks\.\w+"),
    (r"deployments/gateway/\w+\.py", r"deployments\.gateway.*|tasks\.traces\.(?!task$|run$|\w+_sink$|calls$)\w+|tasks\.(errors|files)"),  # noqa: E501
    (r"deployments/provenance/\w+\.py", r"deployments\.provenance\.\w+|tasks\.traces\.(?!task$)\w+|tasks\.(artifacts|errors|files)"),  # noqa: E501
    (r"deployments/generate/\w+\.py", r"deployments\.generate\.\w+|deployments\.lite\.said|flows\.recipes|tasks\.(artifacts|environment|errors|files|models|pictures)|tasks\.pretrain\.found|tasks\.verify\.client"),  # finds as the flows do, asks as verify does  # noqa: E501
    (r"deployments/traces\.py", r"tasks\.traces\.(?!task$)\w+|tasks\.(errors|files)"),  # commands on the queue
    (r"deployments/fit\.py", r"blocks\.opening|flows\.recipes|tasks\.check\.fit|tasks\.(errors|machine|specs)"),  # asks before Prefect  # noqa: E501
    (r"deployments/watch(_page)?\.py", r"deployments\.watch_page|tasks\.reinforce\.streams|tasks\.(artifacts|errors|files|metrics)"),  # reads what trainers stream  # noqa: E501
    (r"deployments/cli\.py", r"deployments\..*|flows\.recipes|blocks\.register|tasks\.(errors|supervision)"),
    (r"deployments/(environments|host)\.py", r"deployments\.host"),  # they run before anything is installed
    (r"deployments/.*\.py", r"deployments\..*|tasks\.serve\.\w+|tasks\.(artifacts|environment|errors|files|processes|procfs|specs)"),  # noqa: E501
]  # fmt: skip
PURE_MAY = (
    r"tasks\.(artifacts|costs|environment|specs|errors|job_report|pictures|ray_cluster|targets)|tasks\.gptoss\.\w+|tasks\.{verb}\.\w+|tasks\.traces\.redaction"
    r"|deployments\.gateway\.(fast_json|settings|variables|routing)|deployments\.lite\.asked|deployments\.provenance\.lineage"
)
IMPURE = {
    "os", "shutil", "subprocess", "socket", "ssl", "tempfile", "threading", "multiprocessing", "asyncio", "time",
    "random", "secrets", "uuid", "platform", "sys", "logging", "fcntl", "signal", "urllib.request", "http.client",
    "requests", "httpx", "aiohttp", "redis", "huggingface_hub", "fastapi", "prefect", "transformers", "datasets", "trl",
    "peft", "accelerate", "safetensors", "torch.distributed", "wandb", "weave", "tasks.files", "tasks.hub",
    "tasks.machine", "tasks.processes", "tasks.procfs", "tasks.supervision", "tasks.prefect_ui", "matplotlib.pyplot",
}  # fmt: skip
IMPURE_CALLS = {
    "open", "print", "input", "read_text", "write_text", "read_bytes", "write_bytes", "exists", "is_file", "is_dir",
    "mkdir", "unlink", "glob", "rglob", "iterdir", "now", "today", "utcnow", "getenv", "cwd", "home", "manual_seed",
}  # fmt: skip


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def _imports(file: str, *, only_on_load: bool = False) -> set[str]:
    """Return the modules that a file imports, anywhere or only when it is loaded; `from x import y` gives x.y if that is one."""  # noqa: E501
    found: set[str] = set()
    for node in _loaded(_tree(file)) if only_on_load else ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            name = node.module or ""
            folder = ROOT / name.replace(".", "/")
            modules = {f"{name}.{alias.name}" for alias in node.names if (folder / f"{alias.name}.py").is_file()}
            found |= modules or {name}
    return found


def _loaded(tree: ast.Module) -> list[ast.AST]:
    """Return the nodes that run on import: nothing inside functions or `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        todo.extend(ast.iter_child_nodes(node))
    return found


def _may(file: str) -> str:
    for pattern, allowed in TABLE:
        match = re.fullmatch(pattern, file)
        if match:
            return allowed.replace("{verb}", match.groupdict().get("verb", "-"))
    return "-"


@pytest.mark.parametrize("file", FILES)
def test_rooms_import_only_what_they_may(file: str):
    ours = {name for name in _imports(file) if name.split(".")[0] in ROOMS}
    wrong = sorted(name for name in ours if not re.fullmatch(_may(file), name))
    assert not wrong, f"{file} imports {', '.join(wrong)}: move what both need up, or ask the handbook, section 2"


def test_table_finds_what_is_forbidden():
    """The rules above would notice: one verb in another, Prefect's side in an edge, a block in the gateway."""
    for file, name in [
        ("tasks/merge/run.py", "tasks.fetch.run"),
        ("tasks/train/worker.py", "blocks.hub"),
        ("tasks/train/run.py", "tasks.prefect_ui"),
        ("deployments/gateway/app.py", "blocks.trace_queue"),
        ("deployments/services.py", "flows.recipes"),
        ("flows/finetune.py", "tasks.merge.run"),
        ("blocks/hub.py", "tasks.hub"),
        ("tasks/files.py", "tasks.fetch.rows"),
    ]:
        assert (ROOT / file).is_file()
        assert not re.fullmatch(_may(file), name), (file, name)


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(("tasks/", "deployments/"))])
def test_only_task_files_and_the_ui_know_prefect(file: str):
    knows = any(name.split(".")[0] == "prefect" for name in _imports(file))
    assert knows is (file.endswith("/task.py") or file == "tasks/prefect_ui.py")


@pytest.mark.parametrize("verb", VERBS)
def test_task_files_load_their_work_inside_the_function(verb: str):
    heavy = {f"tasks.{verb}.run", f"tasks.{verb}.worker", "torch", "transformers", "trl", "peft", "datasets"}
    assert not _imports(f"tasks/{verb}/task.py", only_on_load=True) & heavy
    assert f"tasks.{verb}.run" in _imports(f"tasks/{verb}/task.py")


def _ring(file: str) -> str:
    found = re.search(r"^Ring: (\w+)", ast.get_docstring(_tree(file)) or "", re.M)
    return found[1] if found else ""


PURE = [file for file in FILES if _ring(file) == "pure"]


@pytest.mark.parametrize("file", PURE)
def test_pure_files_touch_no_world(file: str):
    names = _imports(file)
    verb = Path(file).parent.name
    impure = sorted(name for name in names if any(name == bad or name.startswith(f"{bad}.") for bad in IMPURE))
    assert not impure, f"{file} is pure but imports {', '.join(impure)}"
    ours = {name for name in names if name.split(".")[0] in ROOMS}
    wrong = sorted(name for name in ours if not re.fullmatch(PURE_MAY.replace("{verb}", verb), name))
    assert not wrong, f"{file} is pure but imports {', '.join(wrong)}"
    edges = sorted(name for name in ours if (path := name.replace(".", "/") + ".py") in FILES and _ring(path) != "pure")
    assert set(edges) <= {"tasks.artifacts"}, f"{file} is pure but imports the edge {', '.join(edges)}"


@pytest.mark.parametrize("file", PURE)
def test_pure_files_call_nothing_of_the_world(file: str):
    calls = [node.func for node in ast.walk(_tree(file)) if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    assert not names & IMPURE_CALLS


def test_there_are_pure_files():
    assert {"tasks/merge/plan.py", "tasks/merge/delta.py", "tasks/pack/render.py", "tasks/fetch/rows.py"} <= set(PURE)


@pytest.mark.parametrize("file", FILES)
def test_every_module_says_what_it_is_for_and_its_ring(file: str):
    if file.endswith("__init__.py") and not (ROOT / file).read_text().strip():
        return
    assert len((ast.get_docstring(_tree(file)) or "").strip()) > 15, f"{file} has no docstring"
    by_place = file.startswith(("flows/", "blocks/")) or file.endswith(("/task.py", "__init__.py", "__main__.py"))
    if not by_place:
        assert _ring(file) in {"pure", "edge", "task"}, f"{file} does not say its ring"


def test_no_flow_or_block_hides_a_module():
    """Prefect loads such files as scripts, with their folder first on sys.path."""
    path = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
    for file in FILES:
        if file.startswith(("flows/", "blocks/")) and not file.endswith("__init__.py"):
            stem = Path(file).stem
            hidden = stem in sys.stdlib_module_names or PathFinder.find_spec(stem, path) is not None
            assert not hidden, f"{file} hides the module {stem}"


def test_flow_files_define_flows_only():
    """A class there would exist twice, as finetune.X and flows.finetune.X."""
    for file in FILES:
        if file.startswith("flows/"):
            assert not [node.name for node in ast.walk(_tree(file)) if isinstance(node, ast.ClassDef)], file


def test_names_say_what_is_inside():
    parts = {part for file in FILES for part in Path(file).with_suffix("").parts}
    assert not parts & {"utils", "util", "helpers", "common", "misc", "manager"}
