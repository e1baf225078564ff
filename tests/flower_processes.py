"""Flower's processes on loopback with TLS and keys for its nodes, each in a session of its own, ended with the test."""

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

BIN, ROOT = Path(sys.executable).parent, Path(__file__).parents[1]
# What nginx has around the part for a server: one process, and all that it writes in its own place.
NGINX_CONF = """\
daemon off;
master_process off;
pid {home}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {home}/nginx-body;
    proxy_temp_path {home}/nginx-proxy;
    fastcgi_temp_path {home}/nginx-other;
    scgi_temp_path {home}/nginx-other;
    uwsgi_temp_path {home}/nginx-other;
{server}
}}
"""
# Debian's nginx lies where only root looks for programs.
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def make_certificates(home: Path) -> Path:
    """`ca.pem`, and `server.pem` with `server.key` for federation.example and 127.0.0.1."""
    home.mkdir()
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in ("ca", "server")}
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {home.name}")])
    now = datetime.now(UTC)
    for name, key in keys.items():
        subject = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {home.name}" if name == "ca" else name)]
        )
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        built = built.serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        built = built.add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
        if name == "server":
            names = [x509.DNSName("federation.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
        (home / f"{name}.pem").write_bytes(built.sign(keys["ca"], hashes.SHA384()).public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (home / f"{name}.key").write_bytes(private)
    return home


def make_node_key(path: Path) -> Path:
    """As `ssh-keygen -t ecdsa -b 384` makes it, with the public key beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Flower:
    """A SuperLink, what runs its ServerApps, and nodes; each program's output is in `NAME.log`.

    Args:
        home: for all their files.
        authenticated: let no node in whose key was not registered.
        trace: have strace write in `NAME.trace` with whom each program connects.
    """

    def __init__(self, home: Path, *, authenticated: bool = False, trace: bool = False) -> None:
        self.home, self.authenticated, self.trace = home, authenticated, trace
        self.port, self.gate_port = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
        }
        self.tls = make_certificates(home / "tls")
        (home / "secret").write_bytes(os.urandom(32))
        (home / "flwr").mkdir()
        (home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.tls / "ca.pem"}"\n'
            f'\n[superlink.gated]\naddress = "127.0.0.1:{self.gate_port}"\n'
            f'root-certificates = "{self.tls / "ca.pem"}"\n'
        )

    def start(self, name: str, *words: object) -> subprocess.Popen:
        """A program of the environment that runs the tests."""
        traced = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-A",
            "-e",
            "trace=connect,sendto",
            "-o",
            self.home / f"{name}.trace",
        ]
        command = [*(traced if self.trace else []), BIN / str(words[0]), *words[1:]]
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env=self.environment,
                start_new_session=True,
            )
        return self.processes[name]

    def superlink(self) -> None:
        """Start it, and wait until it listens."""
        words = ["--host", "127.0.0.1", "--port", self.port, "--database", self.home / "state.db"]
        words += ["--isolation", "process", "--superexec-auth-secret-file", self.home / "secret"]
        words += ["--disable-runtime-dependency-installation"]
        words += ["--enable-supernode-auth"] if self.authenticated else []
        words += ["--ssl-ca-certfile", self.tls / "ca.pem"]
        words += ["--ssl-certfile", self.tls / "server.pem", "--ssl-keyfile", self.tls / "server.key"]
        self.start("superlink", "flower-superlink", *words)
        self.until(lambda: self._listens(self.port))

    def gate(self, proxy: str) -> None:
        """Start a proxy that passes on what nodes need and nothing else, and wait until it listens."""
        config, text = self.home / f"{proxy}.conf", self._documented(proxy)
        if proxy == "caddy":
            config.write_text(text)
            self.start("gate", "caddy", "run", "--config", config, "--adapter", "caddyfile")
        else:
            config.write_text(NGINX_CONF.format(home=self.home, server=text))
            self.start("gate", NGINX, "-c", config)
        self.until(lambda: self._listens(self.gate_port))

    def _documented(self, proxy: str) -> str:
        """What docs/deployment.md has for a proxy, with the test's files and ports in place of a machine's."""
        blocks = (ROOT / "docs" / "deployment.md").read_text().split("```")[1::2]
        sign = {"caddy": "reverse_proxy", "nginx": "proxy_pass"}[proxy]
        [text] = [block for block in blocks if sign in block]
        for theirs, ours in {
            "/srv/": f"{self.tls}/",
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
            "https://federation.example {": f"https://127.0.0.1:{self.gate_port} {{\n    bind 127.0.0.1",
            "auto_https off": "auto_https off\n    persist_config off",
            "listen 443 ssl": f"listen 127.0.0.1:{self.gate_port} ssl",
        }.items():
            text = text.replace(theirs, ours)
        return text

    def worker(self, name: str) -> Path:
        """Start a client's resident worker; returns its directory."""
        self.start(f"{name}-worker", "hf-fedlarge", "flower", "worker", self.home / f"{name}-worker")
        return self.home / f"{name}-worker"

    def is_ready(self, name: str) -> bool:
        """Whether a worker is."""
        return "ready in" in (self.home / f"{name}-worker.log").read_text()

    def superexec(self) -> None:
        """Start what starts ServerApps."""
        words = ["--runtime-api-address", f"127.0.0.1:{self.port}", "--root-certificates", self.tls / "ca.pem"]
        self.start("superexec", "flower-superexec", *words, "--superexec-auth-secret-file", self.home / "secret")

    def _listens(self, port: int) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    def supernode(self, name: str, *words: object, port: int | None = None, **settings: object) -> subprocess.Popen:
        """A client's; `settings` are its node configuration, and `words` say how it connects (by TLS)."""
        words = words or ("--root-certificates", self.tls / "ca.pem")
        config = " ".join(f"{key}={json.dumps(str(value))}" for key, value in {"client": name, **settings}.items())
        address = ["--superlink", f"127.0.0.1:{port or self.port}", "--port", free_port()]
        return self.start(name, "flower-supernode", *address, "--node-config", config, *words)

    def run(self, app: Path) -> str:
        """Submit an app; returns the run's id."""
        said = self.command("run", app, "test", "--format", "json")
        return json.loads(said[said.index("{") :])["run-id"]

    def command(self, *words: object) -> str:
        """What a `flwr` command says."""
        done = self.attempt(*words)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def attempt(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A `flwr` command, which may fail."""
        how = {"capture_output": True, "text": True, "check": False, "cwd": self.home, "env": self.environment}
        return subprocess.run([str(BIN / "flwr"), *map(str, words)], timeout=120, **how)

    def server_app(self) -> psutil.Process | None:
        """The process of the ServerApp, if there is one."""
        for process in psutil.Process(self.processes["superexec"].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any("flwr-serverapp" in word for word in process.cmdline()):
                    return process
        return None

    def command_lines(self, name: str) -> str:
        """Of what a program has started and is still there."""
        lines = []
        for process in psutil.Process(self.processes[name].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                lines += process.cmdline()
        return " ".join(lines)

    def kill(self, name: str) -> list[psutil.Process]:
        """By SIGKILL; returns what it had started, which notices by itself."""
        process = self.processes.pop(name)
        started = psutil.Process(process.pid).children(recursive=True)
        for traced in psutil.Process(process.pid).children() if self.trace else []:
            started.remove(traced)
            traced.kill()
        process.kill()
        process.wait()
        return started

    def logs(self) -> str:
        """Of all programs, for a test that fails."""
        return "\n".join(f"=== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self.home.glob("*.log")))

    def until(self, true, seconds: float = 300) -> None:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def end(self) -> None:
        """End every process that was started here, and those that they started."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # strace itself takes none
        until = time.monotonic() + 5
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.1))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
