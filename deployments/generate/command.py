"""`tatara generate --model M --prompt P --max-tokens N`: what a model says, as it says it.

    M: folder | Hub id | first digits of an artifact's key | pretrain recipe | latest   -> transformers, here
    --url http://host:port                                                              -> vLLM or the gateway

The text goes to stdout as it comes, the figures to stderr at the end. Nothing heavy is loaded before the options are
known to be right.

Ring: edge. Exit status 0; errors are raised.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from deployments.generate.wish import Told, Wish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `tatara generate` understands to its parser."""
    parser.add_argument(
        "--model", default="", help="folder, Hub id, digits of an artifact's key, pretrain recipe, or latest (default)"
    )
    parser.add_argument("--prompt", required=True, help="what the text begins with, or is asked with --chat")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest tokens that sum to P")
    parser.add_argument("--seed", type=int, help="of the draw; without one each run differs")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--memory-picture", type=Path, metavar="FILE.png", help="draw the memory over the generation")
    parser.add_argument("--url", default="", help="ask vLLM or the gateway at http://host:port instead")


def run(options: argparse.Namespace) -> int:
    """Say what the options ask for; return the exit status."""
    wish, told = Wish.of(options), Told()
    pieces = _from_endpoint(options, wish, told) if options.url else _from_files(options, wish, told)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stderr.write(f"{told.line()}\n")
    return 0


def _from_endpoint(options: argparse.Namespace, wish: Wish, told: Told) -> Iterator[str]:
    from deployments.generate.remote import say

    Wish.require_no_picture(options.memory_picture)
    return say(options.url, options.model, wish, told)


def _from_files(options: argparse.Namespace, wish: Wish, told: Told) -> Iterator[str]:
    from deployments.generate.find import find_model

    root = Path(os.environ.get("TATARA_HOME") or ".tatara").expanduser().resolve()
    source = find_model(options.model or "latest", root)
    from deployments.generate.local import say  # torch: only when the model is known to be there

    sys.stderr.write(f"{source.said}\n")
    return say(source.place, wish, told, options.memory_picture)
