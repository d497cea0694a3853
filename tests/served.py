"""Servers for tests: in a thread of this process, or a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from langchain_latentmas import LatentService
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.server import Server
from langchain_latentmas.service.serving import ServeSettings

from .support import wait_for

TOKEN = "a token of more than sixteen characters"


@contextmanager
def serving(service: LocalService, **settings: Any) -> Iterator[Server]:
    """A server in a thread, on a free port; ends with its service."""
    server = Server(service, ServeSettings(port=0, **settings))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: bool(server.address) or not thread.is_alive())
    try:
        yield server
    finally:
        server.drain()
        thread.join(60)
        assert not thread.is_alive()


def client(server: "Server | Process", **settings: Any) -> LatentService:
    return LatentService.load(server.address, **{"patience": 20, **settings})


class Process:
    """`latentmas serve` as users start it."""

    def __init__(self, *flags: str, port: int = 0, **environment: str) -> None:
        self.log: list[dict[str, Any]] = []
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "langchain_latentmas.cli", "serve", "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.address = ""
        Thread(target=self._read, daemon=True).start()
        wait_for(lambda: bool(self.address) or self.process.poll() is not None, 180)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"message": line.rstrip()}
            self.log.append(entry)
            self.address = entry.get("address", self.address)

    def ended(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signals it and waits; returns the exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)

    def __enter__(self) -> "Process":
        assert self.address, self.log
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def certificate(folder: Path) -> dict[str, Path]:
    """Settings of a server with HTTPS, whose certificate is its own authority."""
    files = {"certificate": folder / "cert.pem", "certificate_key": folder / "key.pem"}
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    out = ("-addext", "subjectAltName=IP:127.0.0.1", "-out", files["certificate"], "-keyout", files["certificate_key"])
    subprocess.run([*command.split(), *out], check=True, capture_output=True)
    return files
