"""A server's process: it ends on SIGTERM when everything that it accepted is finished."""

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .app import Service

_SECONDS_OPEN = 75  # of a connection without a request: longer than clients and proxies keep it, or they ask in vain
_SECONDS_TO_READ = 30  # what clients have, at the end, to take the answers that are there
_SECONDS_TO_REFUSE = 10  # how long it says so, at the end, to those who still ask
_SECONDS_QUIET = 2  # without one of them, after which it ends sooner


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests; a second Ctrl-C ends at once."""
        if self._service.draining and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Is it time to end?"""
        if self._service.draining and self._service.is_idle:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer on while requests come: whose request is on its way gets its 503, and no connection that breaks."""
        started = time.monotonic()
        while self.server_state.connections and not self.force_exit:
            now = time.monotonic()
            if now - max(started, self._service.refused) > _SECONDS_QUIET or now - started > _SECONDS_TO_REFUSE:
                break
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and what was accepted until then to its end.

    Raises:
        OSError: the address cannot be used.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        timeout_keep_alive=_SECONDS_OPEN,
        timeout_graceful_shutdown=_SECONDS_TO_READ,
    )
    listening = config.bind_socket()
    _Server(config, app.state.service).run(sockets=[listening])
