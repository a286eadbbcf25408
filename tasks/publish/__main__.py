"""Upload a folder with model and tokenizer that lies here already, whoever made it.

    python -m tasks.publish --input_tokenizer_and_model_dir DIR --repo_id owner/name [--hf_token TOKEN]

The parameters are those of upload_tokenizer_and_finetuned_model_to_huggingface_hub.py; the upload is the one that the
flows use: a private repo, one commit, checksums read back, and a second call sends nothing. No card is written.

Ring: edge. Exit status: 0 done, 1 an error of ours (one line on stderr), 2 wrong usage.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi

from tasks.environment import read_secret
from tasks.errors import MissingError, TataraError, TokenError
from tasks.hub import find_repo
from tasks.publish.upload import Job, upload
from tasks.specs import PublishSpec, change

logger = logging.getLogger("tasks.publish")


def main(arguments: list[str] | None = None) -> int:
    """Upload one folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.publish", description="Upload a model folder to the Hub.")
    parser.add_argument("--input_tokenizer_and_model_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--repo_id", default="", help="owner/name; default: HF_REPO_NAME")
    parser.add_argument("--hf_token", default="", help="better: HF_TOKEN in the environment, which `ps` does not show")
    parser.add_argument("--public", action="store_true", help="make a new repo public, and take one that is")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        upload_folder(options)
    except TataraError as error:
        logger.error("error: %s", error)
        return 1
    return 0


def upload_folder(options: argparse.Namespace) -> None:
    """Upload what the options name. Raises: MissingError (no folder, no repo), TokenError, and what upload raises."""
    folder = options.input_tokenizer_and_model_dir.expanduser()
    spec = change(PublishSpec(), {"repo_id": options.repo_id, "private": not options.public})
    repo_id, token = find_repo(spec), options.hf_token.strip() or read_secret(os.environ, "HF_TOKEN")
    if not folder.is_dir():
        raise MissingError(f"--input_tokenizer_and_model_dir {folder} is no folder: name the one with config.json")
    if not repo_id:
        raise MissingError("no repository is named: give --repo_id owner/name, or set HF_REPO_NAME")
    if not token:
        raise TokenError("no token: set HF_TOKEN to one with write access, or give --hf_token")
    hub = HfApi(token=token)
    title = f"Upload {folder.resolve().name} with Tatara"
    made = upload(Job(hub=hub, repo_id=repo_id, folder=folder, spec=spec, title=title, keep_card=False))
    logger.info("%s/%s/tree/%s", hub.endpoint, repo_id, made.commit)


if __name__ == "__main__":
    sys.exit(main())
