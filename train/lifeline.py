"""Word that all ranks of a run must have at once: one failed, was lost, or was asked to stop."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from famt.pipeline import storage

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # what asks a run to stop
_GRACE = 3.0  # seconds in which a rank may end by itself
_SILENCE = 20  # seconds after which a machine that does not answer is gone
_LEAVE = 0  # not the number of a signal


class RankError(RuntimeError):
    """Another rank failed or was lost, and this one can't go on without it."""


class Lifeline:
    """A connection of each rank to the main one, which passes on what the others must know.

    When a process dies, whatever killed it, the kernel closes its connection; when a machine does,
    its silence ends it. A thread listens, so that a rank is reached in a collective as well, where
    it would wait for the lost one: there it ends without returning to Python.

    Args:
        rank: of this process.
        address: of the main rank's machine.
        gather: brings a value of every rank to all.
    """

    def __init__(self, rank: int, address: str, gather: Callable[[object], list]) -> None:
        self._stop_asked, self._tell = False, lambda: None
        self._rank, self._cause = rank, ""
        self._ended, self._left = threading.Event(), threading.Event()
        self._names = gather(f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        self._peers = self._connect(address, gather)
        for peer in self._peers:
            _notice_silence(peer)
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def hear_signals(self, tell: Callable[[], None]) -> int:
        """Let a signal to this process, even one in a collective, be heard on all ranks.

        Args:
            tell: is called, from a thread, when any rank is asked to stop.

        Returns:
            what `signal.set_wakeup_fd` gave, to be given back to it.
        """
        self._tell = tell
        if self._stop_asked:
            tell()
        return signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def explain(self, error: BaseException) -> BaseException:
        """Tell the other ranks why this one ends, unless one of them is the reason.

        Returns:
            `error`, or a `RankError` that names the rank that failed first.
        """
        # Collectives raise it when another rank is gone.
        if isinstance(error, RuntimeError) and self._ended.wait(_GRACE):
            return RankError(self._cause)
        if self._cause:
            return error
        text = storage.reason(error) if isinstance(error, Exception) else type(error).__name__
        self._cause = f"{self._names[self._rank]} failed: {text}"
        self._send(ended=self._cause)
        return error

    def close(self) -> None:
        """Leave without alarm."""
        self._send(left=True)
        self._left.set()
        self._wake.send(bytes([_LEAVE]))

    def _connect(self, address: str, gather: Callable[[object], list]) -> dict[socket.socket, int]:
        """Connections to the main rank, or on it from all others, each with the other's rank."""
        if self._rank:
            port, word = gather(None)[0]
            peer = socket.create_connection((address, port), timeout=_SILENCE)
            peer.sendall(_hello(word, self._rank))
            return {peer: 0}
        peers: dict[socket.socket, int] = {}
        six = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if six else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, backlog=len(self._names), dualstack_ipv6=six
        ) as server:
            word = secrets.token_hex(8)
            gather((server.getsockname()[1], word))
            server.settimeout(_SILENCE)
            while len(peers) < len(self._names) - 1:
                peer, _ = server.accept()
                peer.settimeout(_SILENCE)
                try:
                    hello = peer.recv(len(_hello(word, 0)), socket.MSG_WAITALL)
                except OSError:
                    continue
                if hello.startswith(word.encode()):  # and not someone who looks for open ports
                    peers[peer] = int(hello.split()[1])
        return peers

    def _listen(self) -> None:
        unread = dict.fromkeys(self._peers, b"")
        with selectors.DefaultSelector() as ready:
            for each in (*self._peers, self._woken):
                ready.register(each, selectors.EVENT_READ)
            while not self._left.is_set():
                for key, _ in ready.select():
                    if key.fileobj is self._woken:
                        if set(self._woken.recv(64)) & set(ASKING):
                            self._hear({"stop": True})
                        continue
                    peer: socket.socket = key.fileobj  # type: ignore[assignment]
                    try:
                        received = peer.recv(65536)
                    except OSError:
                        received = b""
                    if not received:
                        ready.unregister(peer)
                        lost = self._names[self._peers[peer]]
                        self._hear({"ended": f"{lost} was lost"})
                        continue
                    *lines, unread[peer] = (unread[peer] + received).split(b"\n")
                    for line in map(json.loads, lines):
                        if "left" in line:
                            ready.unregister(peer)
                            break
                        self._hear(line)

    def _hear(self, message: dict[str, Any]) -> None:
        """Do as a message says; the main rank passes it on first."""
        news = "ended" in message or not self._stop_asked
        if news and not self._cause and (self._rank == 0 or "stop" in message):
            self._send(**message)
        if "stop" in message:
            self._stop_asked = True
            self._tell()
        elif not self._cause:
            self._cause = message["ended"]
            self._ended.set()
            if not self._left.wait(_GRACE):
                print(f"error: {self._cause}", file=sys.stderr, flush=True)
                os._exit(2)

    def _send(self, **message: object) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            try:
                peer.sendall(line)
            except OSError:
                continue  # whoever is gone is noticed where it is listened to


def _hello(word: str, rank: int) -> bytes:
    return f"{word} {rank:8d}".encode()


def _notice_silence(peer: socket.socket) -> None:
    """Let the kernel end a connection whose other end has not answered for `_SILENCE` seconds."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE // 4)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE // 4)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE)
