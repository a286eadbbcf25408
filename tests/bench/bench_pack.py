"""How fast chats become packed rows, and in how much memory: ours, and TRL's own preparation, one after the other.

python tests/bench/bench_pack.py [--chats 20000]       one JSON line each: seconds, CPU seconds, tokens/s, peak RSS

The chats are the shipped ones, one to six of them joined, so their lengths differ. Both get the gpt-oss tokenizer,
learn the answers only, and pack into rows of 4,096; TRL is its SFTTrainer's constructor, less what it takes on 8 rows.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROW_TOKENS = 4096


def write_chats(path: Path, count: int) -> None:
    """Write `count` chats of one to six joined questions and answers."""
    shipped = [json.loads(line)["messages"] for line in (ROOT / "data/ja_culture/train.jsonl").open()]
    dice = random.Random(0)
    with path.open("w") as output:
        for number in range(count):
            chosen = dice.choices(shipped, k=dice.randint(1, 6))
            asked, answered = ("\n".join(chat[turn]["content"] for chat in chosen) for turn in (0, 1))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            output.write(json.dumps({"id": f"r{number}", "messages": messages}, ensure_ascii=False) + "\n")


def ours(chats: Path, tokenizer: Path, folder: Path) -> int:
    """Pack with tasks.pack; return the number of tokens."""
    from huggingface_hub import HfApi

    from tasks.artifacts import ArtifactStore
    from tasks.fetch.run import fetch_dataset
    from tasks.pack.run import pack_dataset
    from tasks.specs import FetchSpec, PackSpec
    from tests.tiny import make_base

    store = ArtifactStore(folder / "home")
    base = make_base(store, folder / "base")
    base = base.model_copy(update={"model_folder": str(tokenizer)})
    dataset = fetch_dataset(FetchSpec(source=str(chats), validation_pct=1), store, HfApi(token=False))
    begin()
    return pack_dataset(dataset, base, PackSpec(row_tokens=ROW_TOKENS), store).num_train_tokens


def trl(chats: Path, tokenizer: Path, folder: Path, processes: int | None = None) -> int:
    """Pack with SFTTrainer's constructor; return the number of tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.tiny import make_model

    rows = [json.loads(line)["messages"] for line in chats.open()]
    data = Dataset.from_dict({"prompt": [row[:1] for row in rows], "completion": [row[1:] for row in rows]})
    options = SFTConfig(
        output_dir=str(folder), packing=True, max_length=ROW_TOKENS, report_to="none", dataset_num_proc=processes,
        use_cpu=True, bf16=False,
    )  # fmt: skip
    made = AutoTokenizer.from_pretrained(tokenizer)

    def prepare(part: Dataset) -> Dataset:
        return SFTTrainer(make_model(), options, train_dataset=part, processing_class=made).train_dataset

    prepare(data.select(range(8)))
    begin()
    return sum(map(len, prepare(data)["input_ids"]))


_begun: list[float] = []


def begin() -> None:
    """Start the clocks: imports and the making of inputs are not counted."""
    _begun[:] = [time.perf_counter(), sum(os.times()[:4])]


def measure(name: str, chats: Path, tokenizer: Path) -> None:
    """Run one side in this process and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"ours": ours, "trl": trl, "trl-2": lambda *places: trl(*places, processes=2)}[name]
        tokens = run(chats, tokenizer, Path(folder))
        seconds, cpu = time.perf_counter() - _begun[0], sum(os.times()[:4]) - _begun[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "tokens_per_s": round(tokens / seconds)}
    about = {"tokens": tokens, "peak_rss_mb": round(peak), "cpus": os.cpu_count(), "python": platform.python_version()}
    sys.stdout.write(json.dumps({"name": name, **figures, **about}) + "\n")


def main() -> None:
    """Make the chats, then measure each side in a process of its own, twice, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=20_000)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "CHATS", "TOKENIZER"))
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], Path(options.one[1]), Path(options.one[2]))
        return
    from tasks.gptoss.tokenizer import shared_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        chats, tokenizer = Path(folder) / "chats.jsonl", Path(folder) / "tokenizer"
        shutil.copytree(shared_tokenizer(Path(folder)), tokenizer)
        (tokenizer / "config.json").write_text('{"max_position_embeddings": 131072, "model_type": "gpt_oss"}')
        write_chats(chats, options.chats)
        for _ in range(2):
            for name in ("ours", "trl", "trl-2"):
                subprocess.run([sys.executable, __file__, "--one", name, str(chats), str(tokenizer)], check=True)


if __name__ == "__main__":
    main()
