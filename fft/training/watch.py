"""Ranks watch one another: when one fails, or its machine or the way to it is gone, all others end, and say why.

What waits for a rank that is gone waits in C++, for minutes or for ever, and then knows nothing. So a thread of every
rank keeps a connection to rank 0 (:mod:`fft.training.meeting`): a word a second each way. It carries what went wrong
to rank 0, whose log is the one that is read, and from there to all. The first ranks of two machines have one, too, as
the way between these may be gone while both reach rank 0. A thread that has heard the end says so and ends its process,
whatever that is waiting for.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from types import TracebackType

from fft.errors import EXIT_AGAIN, ElsewhereError, UserError, one_line, tell_launcher
from fft.redaction import fit_to_print
from fft.training.meeting import Meeting

#: Seconds between two words; for a failure that explains another, or rank 0's own; for what a run holds to be let go.
_BEAT, _GRACE, _LAST = 1.0, 1.5, 10.0
#: Seconds that a process has stood still, as is noticed; so that it can say nothing of the others'; worth a line.
_NOTICED, _STILL, _WORTH_A_LINE = 1.0, 5.0, 10.0
#: Seconds for which what one rank says of another waits, as rank 0 may know it itself.
_HEARSAY = 3.0
#: Bytes that may wait for somebody who does not read.
_BACKLOG = 1 << 16

#: What gloo says when another process, or the way to it, is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
#: What to do when a rank is gone.
_AGAIN = "the same command with --resume auto goes on from the last checkpoint."


class LostError(ElsewhereError):
    """Another rank is gone. The same command may well go on from the last checkpoint."""

    exit_code = EXIT_AGAIN


class _Link:
    """A connection to another rank: lines of JSON, sent and received without waiting."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.heard, self.told = sock, time.monotonic(), False
        self._incoming, self._outgoing = b"", b""

    def send(self, message: dict) -> None:
        """Send what fits; the rest goes with the next. Too much for somebody who reads nothing is left out."""
        if len(self._outgoing) < _BACKLOG:
            self._outgoing += json.dumps(message).encode() + b"\n"
        with suppress(OSError):  # who is gone is found out by reading
            self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]

    def receive(self) -> list[dict] | None:
        """What has come; None where nothing will come any more."""
        try:
            more = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not more:
            return None
        self.heard = time.monotonic()
        *lines, self._incoming = (self._incoming + more).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch:
    """A rank's eye on the others, for the length of a ``with`` block; ``patience`` is how many seconds one may be
    silent. An exception that leaves the block reaches all ranks; what :attr:`held` holds is let go in any case.
    """

    def __init__(self, meeting: Meeting, patience: float) -> None:
        self.meeting, self._patience = meeting, patience
        #: What has to be closed before this process ends: metrics, locks.
        self.held = ExitStack()
        #: Is told of any time in which this process stood still: its beginning and its end, by the monotonic clock.
        self.on_still: Callable[[float, float], None] | None = None
        self._links = {rank: _Link(sock) for rank, sock in sorted(meeting.links.items())}
        self._failures: list[tuple[float, str, int]] = []  # when, what, and the exit code
        self._missed: set[int] = set()
        self._lock, self._ending, self._closed = threading.RLock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @property
    def _leads(self) -> bool:
        return self.meeting.rank == 0

    def __enter__(self) -> "Watch":
        if self.meeting.links:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, stack: TracebackType | None) -> None:
        if isinstance(error, Exception) and self.meeting.links:
            self._fail(error)
        self.held.__exit__(kind, error, stack)
        self._close()

    def _fail(self, error: Exception) -> None:
        """Have all ranks know of what has ended this one, and this process end with the others.

        Raises :class:`LostError` in place of what gloo says, if that should not be.
        """
        raised = error
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER):
            error = LostError(f"{self.meeting.own} lost the connection to another rank: see what that said; {_AGAIN}")
        if not isinstance(error, UserError):
            self._say("".join(traceback.format_exception(error)))
            error = UserError(
                f"{self.meeting.own} has ended with {type(error).__name__} ({one_line(error)}); see its log."
            )
            error.exit_code = 1
        # What only follows from another rank's failure is not told before that, if that is told at all.
        later = _GRACE if isinstance(error, ElsewhereError) else 0.0
        with self._lock:
            if self._leads:
                self._failures.append((time.monotonic() + later, str(error), error.exit_code))
            elif 0 in self._links:
                self._links[0].send({"failed": str(error), "code": error.exit_code, "later": later})
        time.sleep(3 * _GRACE + _LAST)  # the thread ends this process
        if isinstance(error, LostError):
            raise error from raised

    def _close(self) -> None:
        """Say good-bye."""
        self._closed.set()
        if self.meeting.links:
            self._thread.join(2 * _BEAT)
        with self._lock:
            for link in self._links.values():
                link.send({"bye": True})
                link.socket.close()

    def _watch(self) -> None:
        """The thread: listen, speak, and judge."""
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, rank)
            spoken = looked = time.monotonic()
            while not self._closed.is_set():
                ready = selector.select(0.1)
                now = time.monotonic()
                if now - looked > _NOTICED and self.on_still is not None:
                    self.on_still(looked, now)
                if now - looked > _STILL:
                    self._stood_still(now - looked)
                looked = now
                with self._lock:
                    for key, _ in ready:
                        if key.data not in self._links or not self._hear(key.data, self._links[key.data]):
                            selector.unregister(key.fileobj)
                    if now - spoken >= _BEAT:
                        spoken = now
                        self._speak(now)
                    self._judge(now)

    def _speak(self, now: float) -> None:
        for rank, link in [*self._links.items()]:
            link.send({})
            silent = now - link.heard
            if silent > _WORTH_A_LINE and not link.told and self._leads:
                link.told = True
                self._say(f"warning: {self.meeting.peers[rank]} has said nothing for {silent:.0f} s")
            if silent > self._patience:
                self._miss(rank, f"has said nothing for {silent:.0f} s (--timeout)")

    def _stood_still(self, seconds: float) -> None:
        """This process was stopped, or starved: nobody else was silent for that."""
        for link in self._links.values():
            link.heard = time.monotonic()
        if self._leads:
            self._say(f"warning: {self.meeting.own} stood still for {seconds:.0f} s")
        elif 0 in self._links:
            self._links[0].send({"still": seconds})

    def _hear(self, rank: int, link: _Link) -> bool:
        """Take in what a rank says; returns whether there may be more."""
        messages = link.receive()
        if messages is None:
            self._miss(rank, "has ended without a word")
            return False
        link.told = False
        for message in messages:
            if "bye" in message:
                self._links.pop(rank, None)
                return False
            if "still" in message:
                self._say(f"warning: {self.meeting.peers[rank]} stood still for {message['still']:.0f} s")
            if "failed" in message:
                self._failures.append(
                    (time.monotonic() + message["later"], self._named(rank, message), message["code"])
                )
            if "end" in message:
                self._end(message["end"], message["code"])
        return True

    def _named(self, rank: int, message: dict) -> str:
        """What a rank says went wrong, with its name where its machine is another one than rank 0's."""
        peer, said = self.meeting.peers[rank], message["failed"]
        return said if peer.host == self.meeting.own.host or str(peer) in said else f"{peer}: {said}"

    def _miss(self, rank: int, how: str) -> None:
        """Note that a rank is gone; who says later what went wrong there is believed more."""
        self._links.pop(rank)
        self._missed.add(rank)
        if self._leads or rank == 0:
            sentence = f"{self.meeting.peers[rank]} {how}; {_AGAIN}"
            self._failures.append((time.monotonic() + _GRACE / 2, sentence, EXIT_AGAIN))
        elif 0 in self._links:
            sentence = f"{self.meeting.own} has lost {self.meeting.peers[rank]}, which {how}; {_AGAIN}"
            self._links[0].send({"failed": sentence, "code": EXIT_AGAIN, "later": _HEARSAY})

    def _judge(self, now: float) -> None:
        """End the run for the first failure, once what may explain it had the time to come."""
        if not self._failures:
            return
        when, sentence, code = min(self._failures)
        if now < when + _GRACE:
            return
        self._end(sentence, code, self._links.values())

    def _end(self, sentence: str, code: int, others: Iterable[_Link] = ()) -> None:
        """Say on this machine why, then to ``others``, let go what is held, and end the process."""
        if not self._ending.acquire(blocking=False):
            return
        if self.meeting.own == next(peer for peer in self.meeting.here if peer.rank not in self._missed):
            self._say(f"error: {sentence}")
        for link in others:  # not before: as soon as one of them has ended, a launcher may kill this process
            link.send({"end": sentence, "code": code})
        tell_launcher(sentence)
        letting = threading.Thread(target=self._let_go, args=(UserError(sentence),), daemon=True)
        letting.start()
        letting.join(_LAST)
        self._hang_up()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):
            print(fit_to_print(text), file=sys.stderr, flush=True)

    def _let_go(self, error: Exception) -> None:
        self.held.__exit__(type(error), error, None)

    def _hang_up(self) -> None:
        """Let others have what was sent: a connection that is closed with words unread takes back its own."""
        for link in self._links.values():
            with suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
                link.socket.settimeout(0.5)
                while link.socket.recv(1 << 16):
                    pass
