"""`tatara fit RECIPE`: whether a recipe's training fits a machine, told before anything is downloaded.

    tatara fit qwen_qlora_16gb                                this machine's GPUs (without any: its memory)
    tatara fit gptoss20b_lora_h100 --gpu-gb 80 --gpus 2       a machine that is not here
    tatara fit qwen_qlora_16gb --changes '{"base": {"model": "openai/gpt-oss-120b"}}'

Ring: edge. Exit status: 0 it fits, 1 it does not, or an error of ours.
"""

import argparse
import json
import sys
from math import isfinite
from typing import Any

from blocks.opening import open_hub
from flows.recipes import resolve, resolve_base
from tasks.check.fit import estimate_fit, find_gpus, find_host_room, imagine_gpus, launched, say_fit
from tasks.errors import SpecError
from tasks.specs import Recipe, change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of the command."""
    parser.add_argument("name", metavar="RECIPE")
    parser.add_argument("--gpu-gb", type=float, default=0.0, help="GB (10^9 bytes) of a GPU that is not here")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them: train.num_processes")
    parser.add_argument("--changes", default="{}", help="fields of the recipe to change, as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the estimate; return 0 when it fits, 1 when it does not."""
    recipe = _resolve(options)
    gpus = imagine_gpus(options.gpu_gb, recipe.train.num_processes) if options.gpu_gb else find_gpus(recipe)
    if not options.gpu_gb and 1 < options.gpus > len(gpus):
        raise SpecError(
            f"--gpus {options.gpus}, but this machine has {len(gpus)}: say how large they are with --gpu-gb"
        )
    host = None if options.gpu_gb else find_host_room(recipe)  # of a GPU that is not here the host is not known
    fit = estimate_fit(recipe, resolve_base(recipe), open_hub(""), gpus[: recipe.train.num_processes], host)
    sys.stdout.write(say_fit(fit, options.name) + "\n")
    return 0 if fit.fits else 1


def _resolve(options: argparse.Namespace) -> Recipe:
    """Return the recipe with its changes, on as many GPUs as are asked for. Raises SpecError."""
    if not (isfinite(options.gpu_gb) and options.gpu_gb >= 0) or options.gpus < 1:
        raise SpecError(f"--gpu-gb {options.gpu_gb:g} --gpus {options.gpus}: expected a size and a number above 0")
    try:
        changes: dict[str, Any] = json.loads(options.changes)  # Any: JSON values
    except json.JSONDecodeError as error:
        raise SpecError(f"--changes {options.changes!r} is not JSON ({error}): quote it whole, with '...'") from error
    recipe = resolve(options.name, changes)
    return launched(change(recipe, {"train": {"num_processes": options.gpus}}) if options.gpus > 1 else recipe)
