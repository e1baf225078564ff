"""A process beside a SuperNode that keeps its libraries and its model loaded from round to round.

    hf-fedlarge flower worker DIR       flower-supernode … --node-config '… worker="DIR"'

Flower starts a process for every message; with this one that process passes the order on and waits. `DIR` is for its
owner alone: a socket, a key that whoever connects has to know (new with every start), and the files of the order at
work. What goes over the socket is JSON, and only whoever could train himself can reach it. One order at a time, and who
finds nobody at the socket trains himself.

It ends by SIGTERM or SIGINT and with the process that started it, and leaves off training when whoever asked has gone,
as a ClientApp has whose SuperNode was killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hf_fedlarge.errors import ConfigError, FedLargeError, OutputError
from hf_fedlarge.flower.work import NodeSettings, take_part
from hf_fedlarge.orders import Work
from hf_fedlarge.store import Store
from hf_fedlarge.untrusted import parse_json

if TYPE_CHECKING:
    from hf_fedlarge.jobs import Train

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 2**16
GRACE_SECONDS = 10.0  # for training to leave off, before the process ends without it
_SOCKET, _KEY, _MAILBOX = "socket", "key", "mailbox"


class _Gone(BaseException):
    """Whoever asked has gone; not an `Exception`, of which libraries make others."""


# The side of the ClientApp


def mailbox_in(directory: Path, client: str) -> Store:
    """Where the files of an order for a client lie for the worker of `directory`.

    Raises:
        ConfigError: others than its owner may enter the directory.
    """
    _make_private(directory)
    return Store(str(directory.absolute() / _MAILBOX / client))


def ask(directory: Path, settings: NodeSettings, work: Work, report: Callable[[str], None]) -> bool:
    """Have a worker answer the order in its mailbox; False: none is there, or it went away.

    The worker has a working directory of its own, so files are named to it as they are from the root.

    Raises:
        FedLargeError: why there is no answer.
    """
    try:
        with Client(str(directory / _SOCKET), "AF_UNIX", authkey=(directory / _KEY).read_bytes()) as connection:
            own = settings.model_dump(mode="json") | _from_the_root(settings, work)
            request = {"settings": own, "work": work.model_dump(mode="json")}
            connection.send_bytes(json.dumps(request).encode())
            while True:
                said = parse_json(connection.recv_bytes(MAX_MESSAGE_BYTES), "The worker's answer")
                if "failed" in said:
                    raise FedLargeError(said["failed"])
                if "line" not in said:
                    return True
                report(said["line"])
    except (OSError, EOFError, AuthenticationError) as error:
        report(f"no worker in {directory} ({type(error).__name__}); training here")
        return False


def _from_the_root(settings: NodeSettings, work: Work) -> dict[str, str]:
    """The settings that name files here, and where packages are if that is a directory."""
    found = {name: getattr(settings, name) for name in ("cache", "key", "keys")}
    # What isn't there is a data set's name, or a key's digits, or will be missed.
    maybe = {name: getattr(settings, name) for name in ("data", "eval_data", "server_key")}
    found |= {name: value for name, value in maybe.items() if value and Path(value).exists()}
    packages = settings.store or work.package_store
    if packages and "://" not in packages:
        found["store"] = packages
    return {name: str(Path(value).expanduser().absolute()) for name, value in found.items() if value}


# The worker


def serve(directory: Path, report: Callable[[str], None], parent: int | None = None) -> None:
    """Answer orders until a signal comes or the parent process is gone.

    Args:
        directory: for its socket; made if it isn't there.
        report: told in a line when it is ready.
        parent: the process with which it ends; None: the one that is its parent now.

    Raises:
        ConfigError: others than its owner may enter the directory, or its path is too long for a socket.
        OutputError: another worker is at work there.
    """
    parent = parent or os.getppid()
    _make_private(directory)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"Another worker is at work in {directory}; end it, or choose another directory.") from error
    with lock, _ended_by_signals(parent):
        from hf_fedlarge.trainers.launch import in_process

        train = in_process()
        for name in (_SOCKET, _KEY):
            (directory / name).unlink(missing_ok=True)
        key = os.urandom(32)
        with os.fdopen(os.open(directory / _KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
        try:
            listener = Listener(str(directory / _SOCKET), "AF_UNIX", authkey=key)
        except OSError as error:
            raise ConfigError(f"{directory} can't have a socket ({error}); choose a shorter path.") from error
        try:
            report(f"ready in {directory}")
            while True:
                try:
                    connection = listener.accept()
                except (OSError, EOFError, AuthenticationError):
                    continue  # who doesn't know the key, or has gone
                with connection:
                    _answer(connection, directory, train)
        finally:
            listener.close()
            (directory / _KEY).unlink(missing_ok=True)


def _answer(connection: Connection, directory: Path, train: Train) -> None:
    """Do what is asked for and say how that went; whatever went wrong with it, the worker goes on."""
    try:
        raw = connection.recv_bytes(MAX_MESSAGE_BYTES)
    except (OSError, EOFError):
        return

    def tell(**said: Any) -> None:
        with suppress(OSError):  # whoever asked has gone, which is noticed elsewhere
            connection.send_bytes(json.dumps(said).encode())

    try:
        request = parse_json(raw, "The request")
        settings, work = NodeSettings.model_validate(request["settings"]), Work.model_validate(request["work"])
        with _while_listening(connection):
            mailbox = mailbox_in(directory, settings.client)
            take_part(settings, mailbox, work, lambda line: tell(line=line), train)
    except _Gone:
        return
    except FedLargeError as error:
        tell(failed=f"{error}")
    except Exception as error:
        logger.exception("The worker of %s could not answer an order.", directory)
        tell(failed=f"the worker failed ({type(error).__name__}: {error!s:.1000}); its log has more.")
    else:
        tell(done=True)


@contextmanager
def _while_listening(connection: Connection) -> Iterator[None]:
    """Within it, `_Gone` is raised when the other side closes the connection, over which it sends nothing more."""
    over = threading.Event()

    def leave_off(*_: object) -> None:
        if not over.is_set():
            raise _Gone

    def watch() -> None:
        while not over.is_set():
            if connection.poll(0.2) and not over.is_set():
                _insist(signal.SIGUSR1, over)
                return

    handler = signal.signal(signal.SIGUSR1, leave_off)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        signal.signal(signal.SIGUSR1, handler)


def _insist(number: signal.Signals, over: threading.Event) -> None:
    """Send the main thread a signal; end the process if it has not done what that asks in time."""
    signal.pthread_kill(threading.main_thread().ident, number)
    if not over.wait(GRACE_SECONDS):
        os._exit(1)


@contextmanager
def _ended_by_signals(parent: int) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT end the process, and so does the end of its parent."""
    over, leaving = threading.Event(), threading.Event()

    def leave(*_: object) -> None:
        leaving.set()
        sys.exit(0)

    def watch() -> None:
        while not over.wait(0.5):
            # An exception that comes while an object is being taken away is lost; so it is asked once more.
            if os.getppid() != parent or (leaving.is_set() and not over.wait(2.0)):
                _insist(signal.SIGTERM, over)
                return

    # SIGINT too: Python leaves it ignored where a shell started the process behind an `&`.
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(number, leave) for number in numbers]
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{directory} is open to others (mode {found.st_mode & 0o777:o}); expected 700, its owner's.")
