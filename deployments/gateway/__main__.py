"""Start the gateway: `python -m deployments.gateway`, set up by environment variables (settings.py)."""

import gc
import logging
import os
import socket
import sys

import uvicorn
from fastapi import FastAPI

from deployments.gateway.app import create_app
from deployments.gateway.line import ClientConnection
from deployments.gateway.server import Server
from deployments.gateway.settings import Settings
from tasks.errors import PortTakenError, TataraError


def listen(host: str, port: int) -> socket.socket:
    """Bind and return the listening socket. Raises PortTakenError when another process has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortTakenError(
            f"can't listen on {host}:{port} ({error.strerror}): stop what listens there, "
            "or set LITE_GATEWAY_HOST and LITE_GATEWAY_PORT"
        ) from error
    return listener


def main() -> int:
    """Run until SIGTERM or SIGINT; 2 when the settings are wrong or the port is taken."""
    try:
        settings = Settings.from_environment(os.environ)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        listener = listen(settings.host, settings.port)
        app = create_app(settings)
    except TataraError as error:
        sys.stderr.write(f"gateway: {error}\n")
        return 2
    ClientConnection.max_head_bytes = settings.max_header_bytes
    ClientConnection.head_timeout_s = settings.body_timeout_s

    def note_drain() -> None:
        app.state.gateway.is_draining = True

    _collect_seldom()
    server = Server(_server_config(app, settings), settings.drain_delay_s, note_drain)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _collect_seldom() -> None:
    """Leave what the start made out of every later collection; a request makes no cycles, so look for them seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=ClientConnection,
        loop="auto",
        ws="none",
        interface="asgi3",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.shutdown_s,
        timeout_keep_alive=65,
        backlog=2048,
    )


if __name__ == "__main__":
    sys.exit(main())
