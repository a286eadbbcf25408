"""Whether a recipe fits, from config and headers alone: true shapes of published models, none of their weights."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from deployments import cli
from flows.recipes import resolve
from tasks.check import fit as subject
from tasks.errors import CapacityError, MissingError, SpecError
from tasks.specs import Recipe, change
from tests.hub_server import (
    READ,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)
from tests.tiny import save_dense_model

Shapes = dict[str, tuple[str, tuple[int, ...]]]
SIZES = {  # layers, hidden, inner, heads, key heads, vocabulary: config.json of each
    "Qwen/Qwen2.5-7B-Instruct": (28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-14B-Instruct": (48, 5120, 13824, 40, 8, 152064),
    "Qwen/Qwen1.5-110B-Chat": (80, 8192, 49152, 64, 8, 152064),
}
PUBLISHED = {  # parameters, as the model cards say
    "Qwen/Qwen2.5-7B-Instruct": 7.6e9,
    "Qwen/Qwen2.5-14B-Instruct": 14.8e9,
    "Qwen/Qwen1.5-110B-Chat": 111.2e9,
    "openai/gpt-oss-120b": 116.8e9,
}


def dense(name: str) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors of a Qwen2."""
    layers, hidden, inner, heads, keys, vocabulary = SIZES[name]
    wide = hidden // heads * keys
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (wide, hidden)}
    linear |= {"self_attn.v_proj": (wide, hidden), "self_attn.o_proj": (hidden, hidden)}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes: Shapes = {f"{part}.weight": ("BF16", (vocabulary, hidden)) for part in ("model.embed_tokens", "lm_head")}
    for layer in range(layers):
        for part, size in linear.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = ("BF16", size)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary}
    more = {"num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 32768}
    return {"model_type": "qwen2", "dtype": "bfloat16", **sizes, **more}, shapes


def gpt_oss_120b() -> tuple[dict[str, Any], Shapes]:
    """Config and tensors as published: experts in MXFP4 blocks."""
    shapes: Shapes = {f"{part}.weight": ("BF16", (201088, 2880)) for part in ("model.embed_tokens", "lm_head")}
    attention = {"q_proj": (4096, 2880), "k_proj": (512, 2880), "v_proj": (512, 2880), "o_proj": (2880, 4096)}
    for layer in range(36):
        for part, size in attention.items():
            shapes[f"model.layers.{layer}.self_attn.{part}.weight"] = ("BF16", size)
        for part, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            shapes[f"model.layers.{layer}.mlp.experts.{part}_blocks"] = ("U8", (128, rows, 90, 16))
            shapes[f"model.layers.{layer}.mlp.experts.{part}_scales"] = ("U8", (128, rows, 90))
    sizes = {"num_hidden_layers": 36, "hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088}
    more = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4}
    stored = {"quantization_config": {"quant_method": "mxfp4"}, "max_position_embeddings": 131072}
    return {"model_type": "gpt_oss", **sizes, **more, **stored}, shapes


def put_headers(hub: HubServer, name: str, config: dict[str, Any], shapes: Shapes) -> None:
    """Put a model on the Hub whose weights file ends with its header."""
    header: dict[str, Any] = {}
    end = 0
    for tensor, (kind, size) in shapes.items():
        begin, end = end, end + prod(size) * (1 if kind == "U8" else 2)
        header[tensor] = {"dtype": kind, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text
    hub.add_repo("model", name, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})


@pytest.fixture
def client(hub: HubServer) -> HfApi:
    for name in SIZES:
        put_headers(hub, name, *dense(name))
    put_headers(hub, "openai/gpt-oss-120b", *gpt_oss_120b())
    return HfApi(endpoint=hub.url, token=READ)


def fit_of(recipe: Recipe, client: HfApi, gb: float, count: int = 1) -> subject.Fit:
    return subject.estimate_fit(recipe, None, client, subject.imagine_gpus(gb, count))


@pytest.mark.parametrize(
    ("name", "gb"),
    [("qwen_qlora_16gb", 16), ("qwen14b_qlora_16gb", 16), ("qwen110b_qlora_80gb", 80), ("qwen110b_qlora_24gb", 24)],
)
def test_a_recipe_fits_the_card_that_it_is_named_after(client: HfApi, name: str, gb: float):
    recipe = resolve(name)
    fit = fit_of(recipe, client, gb)
    weights = sum(map(prod, fit.base.shapes.values()))
    assert weights == pytest.approx(PUBLISHED[recipe.base.model], rel=0.01)
    assert fit.fits and fit.needed_bytes < gb * 1e9
    assert fit.plan.num_rows == recipe.train.rows_per_device * recipe.train.gradient_accumulation
    said = subject.say_fit(fit, name)
    assert f"{weights / 1e9:.1f} billion parameters as nf4, embeddings and head in bfloat16" in said
    assert f"GPU        = {fit.needed_bytes / 1e9:.1f} GB of {gb:.1f} GB" in said and said.endswith("fits: yes")


def test_the_parts_are_those_of_the_shapes(client: HfApi):
    """7 B: 6.525 billion Linear weights in 0.52 bytes, 1.09 billion around them in two, 16 bytes an adapter weight."""
    needs = fit_of(resolve("qwen_qlora_16gb"), client, 16).needs
    assert needs["weights"] == pytest.approx(0.52 * 6.525e9 + 2 * 1.090e9, rel=1e-3)
    assert needs["adapter and optimizer"] == 16 * 28 * 64 * (3584 + 3584 + 3584 + 512)


def test_gpt_oss_120b_is_told_for_what_it_is(client: HfApi):
    """Its experts are unpacked to bfloat16: 234 GB, whatever is asked of the rest."""
    recipe = change(resolve("gptoss20b_lora_h100"), {"base": {"model": "openai/gpt-oss-120b"}})
    fit = fit_of(recipe, client, 80)
    assert sum(map(prod, fit.base.shapes.values())) == pytest.approx(PUBLISHED["openai/gpt-oss-120b"], rel=0.01)
    said = subject.say_fit(fit, "gptoss20b_lora_h100")
    assert not fit.fits and "GPU        weights 232." in said and "as bfloat16, unpacked from MXFP4" in said
    ways = said.partition("fits: no\n")[2]
    assert "on 8 such GPUs with train.num_processes = 8, parallel = fsdp2: " in ways and "nf4" not in ways
    assert ways.strip().endswith("and 1868.4 GB of host memory")  # eight copies while it is unpacked
    shared = change(recipe, {"train": {"num_processes": 8, "parallel": "fsdp2"}})
    assert fit_of(shared, client, 80, 8).fits
    assert "host       1868." in subject.say_fit(fit_of(shared, client, 80, 8), "x")  # 8 copies while it is unpacked
    with pytest.raises(SpecError, match=r"nf4 \(USE_4BIT\) but the base is stored as mxfp4: set it to none \(False\)"):
        fit_of(change(recipe, {"train": {"quantization": "nf4"}}), client, 80)


def test_gpt_oss_120b_fits_one_gpu_with_its_lower_layers_on_the_host(client: HfApi):
    fit = fit_of(resolve("gptoss120b_lora_80gb"), client, 48)
    said = subject.say_fit(fit, "gptoss120b_lora_80gb")
    assert fit.fits and fit.plan.num_offloaded == 33
    assert (
        "33 layers resting on the host" in said
        and "host       79.2 GB for 33 layers that rest there, loading included" in said
    )


def test_experts_that_lie_apart_in_the_files_are_not_made_small(hub: HubServer):
    """transformers stacks them as it loads, and bitsandbytes leaves what is no Linear: 30 B in nf4 are 58 GB."""
    shapes: Shapes = {f"{part}.weight": ("BF16", (151936, 2048)) for part in ("model.embed_tokens", "lm_head")}
    linear = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)}
    expert = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    for layer in range(48):
        parts = {f"self_attn.{part}": size for part, size in linear.items()}
        parts |= {f"mlp.experts.{n}.{part}": size for n in range(128) for part, size in expert.items()}
        shapes |= {f"model.layers.{layer}.{part}.weight": ("BF16", size) for part, size in parts.items()}
    sizes = {"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151936}
    put_headers(hub, "Qwen/Qwen3-30B-A3B", {"model_type": "qwen3_moe", **sizes, "num_attention_heads": 32}, shapes)
    recipe = change(resolve("qwen_qlora_16gb"), {"base": {"model": "Qwen/Qwen3-30B-A3B"}})
    fit = fit_of(recipe, HfApi(endpoint=hub.url, token=READ), 24)
    assert fit.needs["weights"] == pytest.approx(59.7e9, rel=0.02)
    assert "as nf4, experts, embeddings and head in bfloat16\n" in subject.say_fit(fit, "x") and not fit.fits


def nest(config: dict[str, Any]) -> dict[str, Any]:
    """Write a config as models of text and images do, with a null where the class has a default."""
    return {
        "model_type": config["model_type"],
        "text_config": {**config, "head_dim": None},
        "num_key_value_heads": None,
    }


def test_a_config_that_nests_its_sizes_is_told_like_one_that_says_them(client: HfApi, hub: HubServer):
    """With layers that rest: to plan them asks most of a config."""
    config, shapes = dense("Qwen/Qwen2.5-7B-Instruct")
    put_headers(hub, "ada/nested", nest(config), shapes)
    last = {"target_modules": ("27.self_attn.q_proj",)}
    recipe = change(resolve("qwen_qlora_16gb"), {"train": {"lora": last, "offload_layers": -1}})
    other = change(recipe, {"base": {"model": "ada/nested"}})
    fits = [fit_of(each, client, 4) for each in (recipe, other)]
    assert fits[0].plan == fits[1].plan and fits[0].needs == fits[1].needs and fits[0].plan.num_offloaded
    with pytest.raises(SpecError, match="context is 32768"):
        fit_of(change(other, {"pack": {"row_tokens": 65536}}), client, 16)


def test_a_folder_whose_config_has_nulls_is_told_like_one_without(client: HfApi, tmp_path: Path):
    """Llama's first configs say num_key_value_heads = null: as many as there are heads."""
    path = save_dense_model(tmp_path) / "config.json"
    config = {**json.loads(path.read_text()), "num_key_value_heads": 4}
    changes = {"base": {"model": str(tmp_path)}, "pack": {"row_tokens": 256}}
    needs = []
    for written in (config, {**config, "num_key_value_heads": None}):
        path.write_text(json.dumps(written))
        needs.append(fit_of(change(resolve("qwen_qlora_16gb"), changes), client, 16).needs)
    assert needs[0] == needs[1] and needs[0]["activations"] > 0


def test_no_gate_is_sent_to_a_host_that_has_no_room_for_it(client: HfApi):
    """As in the training, whose plan it is."""
    recipe = change(resolve("gptoss20b_experts_h100"), {"base": {"model": "openai/gpt-oss-120b"}})
    gpus = subject.imagine_gpus(262, 1)
    roomy, tight = (subject.estimate_fit(recipe, None, client, gpus, gb * 10**9) for gb in (400, 1))
    assert roomy.plan.num_shelved and roomy.work.host_bytes(roomy.plan) <= 400e9
    assert tight.plan.num_shelved == 0 and tight.fits
    assert " sent to the host" in subject.say_fit(roomy, "oss") and " sent to" not in subject.say_fit(tight, "oss")


def test_a_way_out_is_one_that_was_tried(client: HfApi):
    plain = change(resolve("qwen_qlora_16gb"), {"train": {"quantization": "none"}})
    fit = fit_of(plain, client, 16)
    assert not fit.fits
    ways = subject.say_ways_out(fit)
    assert ways[0].startswith("would fit with train.quantization = nf4: ")
    assert not [way for way in ways if "row_tokens" in way]  # 15 GB of weights: no shorter row helps
    assert fit_of(change(plain, {"train": {"quantization": "nf4"}}), client, 16).fits
    long = change(resolve("qwen14b_qlora_16gb"), {"pack": {"row_tokens": 8192}})
    [half, quarter] = subject.say_ways_out(fit_of(long, client, 16)) or ["", ""]
    assert "pack.row_tokens = 4096" in half and "pack.row_tokens = 2048" in quarter
    [none] = subject.say_ways_out(fit_of(resolve("qwen14b_qlora_16gb"), client, 8))
    assert none.startswith("nothing that was tried fits") and ", a smaller base, or an adapter on" in none
    with pytest.raises(CapacityError, match=r"(?s)qwen on 1 x 8 GB GPU, 8\.0 GB free\n.*fits: no\nnothing that was"):
        subject.require_fit(fit_of(resolve("qwen14b_qlora_16gb"), client, 8), "qwen")


def test_without_a_gpu_the_host_has_to_hold_it(client: HfApi):
    fit = subject.estimate_fit(resolve("qwen110b_qlora_80gb"), None, client, [])
    said = subject.say_fit(fit, "x")
    assert fit.room_bytes < 1e12 and "on no GPU: the host's memory" in said and "host       weights " in said


def test_what_can_not_be_trained_at_all_is_an_error(client: HfApi):
    recipe = resolve("qwen_qlora_16gb")
    with pytest.raises(SpecError, match=r"row_tokens = 65536 but the base's context is 32768 .*MAX_SEQ_LENGTH"):
        fit_of(change(recipe, {"pack": {"row_tokens": 65536}}), client, 16)
    with pytest.raises(SpecError, match="'c_attn' hits nothing"):
        fit_of(change(recipe, {"train": {"lora": {"target_modules": ("c_attn",)}}}), client, 16)
    short = {"train": {"max_steps": 50, "warmup_steps": 100}}  # a first try with the template's warm-up
    with pytest.raises(SpecError, match=r"warmup_steps = 100 but .* 50 optimizer steps \(max_steps\): lower warmup_st"):
        fit_of(change(recipe, short), client, 16)
    with pytest.raises(MissingError, match="Qwen/Qwen9"):
        fit_of(change(recipe, {"base": {"model": "Qwen/Qwen9"}}), client, 16)


def test_the_command_prints_it_and_its_status_is_the_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["fit", "tiny", "--gpu-gb", "16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny on 1 x 16 GB GPU, 16.0 GB free\nbase       pretrained ") and "fits: yes" in said
    assert cli.main(["fit", "tiny", "--gpu-gb", "1"]) == 1
    assert "fits: no\n" in capsys.readouterr().out
    assert cli.main(["fit", "tiny", "--gpu-gb", "16", "--gpus", "2"]) == 0
    assert "tiny on 2 x 16 GB GPU" in capsys.readouterr().out
    wrong = ((["--changes", "{x"], "is not JSON"), (["--gpus", "0", "--gpu-gb", "1"], "above 0"))
    for words, message in (*wrong, (["--gpus", "99"], "but this machine has")):
        assert cli.main(["fit", "tiny", *words]) == 1
        assert message in capsys.readouterr().err
    for size in ("nan", "inf", "-1"):
        assert cli.main(["fit", "tiny", f"--gpu-gb={size}"]) == 1
        assert "above 0" in capsys.readouterr().err


def test_a_launch_is_told_for_the_gpus_of_its_nodes(capsys: pytest.CaptureFixture[str]):
    """A login node has none; how many start is checked too."""
    nodes = {"launcher": "slurm", "nodes": 2, "gpus_per_node": 1, "gpu_memory_gb": 16, "gpu_type": "h100"}
    changes: dict[str, Any] = {"train": {"launch": nodes, "gradient_accumulation": 2}}
    assert cli.main(["fit", "tiny", "--changes", json.dumps(changes)]) == 0
    assert "tiny on 2 x H100 16GB, 16.0 GB free" in capsys.readouterr().out
    changes["train"]["gradient_accumulation"] = 3
    assert cli.main(["fit", "tiny", "--changes", json.dumps(changes)]) == 1
    assert "launch starts 2 processes, but a step has 3 batches" in capsys.readouterr().err
