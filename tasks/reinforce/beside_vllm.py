"""Run the worker in vLLM's environment; the trainer's packages stand behind vLLM's own.

    TATARA_TRAINER_PACKAGES=/.../site-packages  <vLLM's python> -m tasks.reinforce.beside_vllm job.json

Ring: edge.
"""

import os
import sys

from tasks.reinforce.vllm_python import PACKAGES


def main() -> None:
    """Add the packages, then be the worker."""
    sys.path.extend(os.environ.get(PACKAGES, "").split(os.pathsep))
    from tasks.reinforce import worker

    worker.main(sys.argv[1])


if __name__ == "__main__":
    main()
