"""prefect.yaml names what exists; the forms that Prefect makes of the flows hold every knob."""

import importlib
from typing import Any

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.utilities.callables import parameter_schema

from deployments.orchestration import NUM_DEPLOYMENTS, POOLS, ROOT
from tasks.specs import BaseRelease, PpoRecipe, PretrainSpec, Recipe, ReinforceRecipe, Spec, _spec_of

TEXT = (ROOT / "prefect.yaml").read_text()
FILE = yaml.safe_load(TEXT)
DEPLOYMENTS: list[dict[str, Any]] = FILE["deployments"]


def _flow(deployment: dict[str, Any]) -> Flow[..., Any]:
    path, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def _full_name(deployment: dict[str, Any]) -> str:
    return f"{_flow(deployment).name}/{deployment['name']}"


def test_prefects_own_model_takes_the_file():
    model = PrefectYamlModel.model_validate(FILE)
    assert len(model.deployments) == len(DEPLOYMENTS)
    known = {*PrefectYamlModel.model_fields, "prefect-version", "definitions"}
    assert set(FILE) <= known
    fields = {name for field in type(model.deployments[0]).model_fields.items() for name in (field[0], field[1].alias)}
    assert all(set(deployment) <= fields for deployment in DEPLOYMENTS)  # a misspelt key would be dropped silently


def test_all_deployments_of_the_issue_are_there():
    assert len(DEPLOYMENTS) == NUM_DEPLOYMENTS
    assert all("tatara" in deployment["tags"] for deployment in DEPLOYMENTS)  # by which they are counted
    assert sorted(map(_full_name, DEPLOYMENTS)) == sorted(
        [
            "finetune/h100",
            "finetune/tiny",
            "finetune/qlora-16gb",
            "pretrain/tiny",
            "pretrain/compact-1b4",
            "reinforce/h100",
            "reinforce/tiny",
            "release/h100",
            "release-base/compact-1b4",
            "publish/model",
            "evaluate/h100",
            "evaluate/tiny",
            "promote/h100",
            "promote/tiny",
            "reinforce-ppo/gsm8k",
            "release-ppo/h100",
            "ingest-traces/every-5-minutes",
        ]
    )


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=_full_name)
def test_each_has_entrypoint_pool_limit_schema_and_fitting_parameters(deployment: dict[str, Any]):
    flow = _flow(deployment)
    assert isinstance(flow, Flow)
    assert deployment["description"]
    assert deployment["enforce_parameter_schema"] is True
    assert deployment["work_pool"]["name"] in POOLS
    assert deployment["work_pool"]["job_variables"]["env"] == {"PREFECT_LOGGING_EXTRA_LOGGERS": "tasks"}
    assert deployment["concurrency_limit"]["limit"] == 1
    schema = parameter_schema(flow).model_dump()
    jsonschema.validate(deployment["parameters"], schema)
    assert set(schema.get("required", ())) <= set(deployment["parameters"])
    flow.validate_parameters({**{n: p.default for n, p in _defaults(flow).items()}, **deployment["parameters"]})


def _defaults(flow: Flow[..., Any]) -> dict[str, Any]:
    import inspect

    return {n: p for n, p in inspect.signature(flow.fn).parameters.items() if p.default is not p.empty}


def test_gpu_work_goes_to_the_gpu_pool():
    pools = {_full_name(deployment): deployment["work_pool"]["name"] for deployment in DEPLOYMENTS}
    assert pools == {
        name: "gpu" if any(part in name for part in ("h100", "16gb", "1b4")) else "local" for name in pools
    }


def test_drain_runs_every_5_minutes_one_at_a_time():
    [drain] = [deployment for deployment in DEPLOYMENTS if deployment["entrypoint"] == "flows/drain.py:drain"]
    assert drain["schedules"] == [{"interval": 300, "active": True}]
    assert drain["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    others = [deployment for deployment in DEPLOYMENTS if deployment is not drain]
    assert not any(deployment.get("schedules") for deployment in others)
    assert {deployment["concurrency_limit"]["collision_strategy"] for deployment in others} == {"ENQUEUE"}


def test_pull_step_is_explicit():
    [[step]] = [list(step.items()) for step in FILE["pull"]]
    assert step == ("prefect.deployments.steps.set_working_directory", {"directory": "{{ $TATARA_CHECKOUT }}"})


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for choice in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        if "$ref" in choice:
            return schema["definitions"][choice["$ref"].rpartition("/")[2]]
    return node


def _check_fields(schema: dict[str, Any], node: dict[str, Any], spec: type[Spec], path: str) -> int:
    assert set(node["properties"]) == set(spec.model_fields), path
    assert node["additionalProperties"] is False, path
    count = 0
    for name, field in spec.model_fields.items():
        inner = _spec_of(field.annotation)
        if inner is not None and issubclass(inner, Spec):
            count += _check_fields(schema, _resolve(schema, node["properties"][name]), inner, f"{path}.{name}")
        else:
            shown = node["properties"][name]
            assert shown.get("description") == field.description, f"{path}.{name}"
            count += 1
    return count


@pytest.mark.parametrize(
    ("module", "flow", "spec", "least"),
    [
        ("finetune", "finetune", Recipe, 60),
        ("release", "release", Recipe, 60),
        ("publish", "publish", Recipe, 60),
        ("evaluation", "evaluate", Recipe, 60),
        ("pretrain", "pretrain", PretrainSpec, 25),
        ("release_base", "release_base", BaseRelease, 25),
        ("reinforce", "reinforce", ReinforceRecipe, 80),
        ("reinforce_ppo", "reinforce_ppo", PpoRecipe, 80),
        ("release_ppo", "release_ppo", PpoRecipe, 80),
    ],
)
def test_form_lists_every_field(module: str, flow: str, spec: type[Spec], least: int):
    found = getattr(importlib.import_module(f"flows.{module}"), flow)
    schema = parameter_schema(found).model_dump()
    changes = _resolve(schema, schema["properties"]["changes"])
    assert _check_fields(schema, changes, spec, spec.__name__) >= least
    assert all(value.get("description") for value in schema["properties"].values())


def test_form_refuses_what_is_misspelt_and_takes_what_is_right():
    from flows.finetune import finetune

    schema = parameter_schema(finetune).model_dump()
    good = {"recipe": "tiny", "changes": {"train": {"lora": {"rank": 4}, "max_steps": 3}}}
    jsonschema.validate(good, schema)
    for bad in ({"recipe": "tinny"}, {"changes": {"trian": {}}}, {"changes": {"train": {"lora": {"rnak": 4}}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
