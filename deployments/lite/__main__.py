"""The gateway's child: `python -m deployments.lite MODEL --name N --socket PATH --room N --threads N`.

It serves on a Unix socket, so nobody but its user reaches it, and it ends with the gateway, also when that
is killed: its standard input is a pipe that then closes. The socket is there once the model is.

Ring: edge (processes).
"""

import argparse
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import uvicorn

logger = logging.getLogger("deployments.lite")


def main() -> int:
    """Serve until the gateway ends; 1 when the model can't be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--room", type=int, required=True, help="requests that may wait")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_end_with_the_gateway, args=(options.socket,), daemon=True).start()
    try:
        from deployments.lite.model import LiteModel  # torch: seconds, during which the gateway's end must be seen

        model = LiteModel.load(options.model, options.threads)
        model.warm_up()
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        logger.error("LITE_MODEL=%r can't be loaded (%s): %s", options.model, type(error).__name__, error)
        return 1
    from deployments.lite.server import Lite

    options.socket.unlink(missing_ok=True)
    logger.info("%s is loaded, %d threads", options.name, options.threads)
    config = uvicorn.Config(
        Lite(model, options.name, options.room),
        uds=str(options.socket),
        http="httptools",
        ws="none",
        interface="asgi3",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=65,
    )
    uvicorn.Server(config).run()
    return 0


def _end_with_the_gateway(place: Path) -> None:
    """Wait for the end of standard input. The gateway closes it when no answer is needed any more."""
    while os.read(0, 4096):
        pass
    with suppress(OSError):  # after a SIGKILL nobody else takes them away
        place.unlink(missing_ok=True)
        place.parent.rmdir()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
