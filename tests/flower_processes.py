"""Flower's processes on loopback, each in a session of its own that is ended with the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Flower:
    """A SuperLink with what connects to it; each program's output is in `NAME.log`.

    Args:
        home: for logs, the SuperLink's database, and Flower's own home.
        tls: a directory with `ca.pem`, `server.pem` and `server.key`; None: plaintext.
    """

    def __init__(self, home: Path, tls: Path | None = None, *superlink: str) -> None:
        self.home, self.tls, self.superlink_options = home, tls, superlink
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        (home / "flwr").mkdir()
        secure = f'root-certificates = "{tls / "ca.pem"}"' if tls else "insecure = true"
        (home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n{secure}\n'
        )

    def start(self, name: str, *words: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """A program, by its file name in the environment that runs the tests."""
        log = (self.home / f"{name}.log").open("ab")
        command = [str(BIN / str(words[0])), *map(str, words[1:])]
        with log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env=self.environment | (environment or {}),
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def superlink(self) -> None:
        """Start it, and wait until it listens."""
        words = ["--host", "127.0.0.1", "--port", self.port, "--database", self.home / "state.db"]
        words += ["--disable-runtime-dependency-installation", *self.superlink_options]
        if self.tls:
            words += ["--ssl-ca-certfile", self.tls / "ca.pem"]
            words += ["--ssl-certfile", self.tls / "server.pem", "--ssl-keyfile", self.tls / "server.key"]
        else:
            words += ["--insecure"]
        self.start("superlink", "flower-superlink", *words)
        self.until(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def supernode(self, name: str, **settings: object) -> None:
        """A client's; `settings` are its node configuration."""
        config = " ".join(f"{key}={json.dumps(str(value))}" for key, value in {"client": name, **settings}.items())
        words = ["--superlink", f"127.0.0.1:{self.port}", "--port", free_port(), "--node-config", config]
        words += ["--root-certificates", self.tls / "ca.pem"] if self.tls else ["--insecure"]
        self.start(name, "flower-supernode", *words, environment={"FLWR_HOME": str(self.home / "flwr")})

    def run(self, app: Path) -> str:
        """Submit an app; returns the run's id."""
        said = self.command("run", app, "test", "--format", "json")
        answer = json.loads(said[said.index("{") :])
        assert answer["success"], said + self.logs()
        return answer["run-id"]

    def command(self, *words: object) -> str:
        """What a `flwr` command says."""
        done = subprocess.run(
            [str(BIN / "flwr"), *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.home,
            env=self.environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, name: str) -> None:
        """By SIGKILL; what it started notices by itself."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def logs(self) -> str:
        """Of all programs, for a test that fails."""
        return "\n".join(f"=== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self.home.glob("*.log")))

    def until(self, true, seconds: float = 240) -> None:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def end(self) -> None:
        """End every process that was started here, and those that they started."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
