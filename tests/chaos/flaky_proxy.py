"""An HTTP proxy before an object store that breaks when it is told to, and writes down every request.

python tests/chaos/flaky_proxy.py PORT UPSTREAM_PORT FAULT_FILE LOG_FILE

FAULT_FILE holds one JSON object (`Outage`), read again with each request; LOG_FILE gets a JSON line a request.
"""

import asyncio
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_BYTES = 2**16
REPLY = "HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{body}"
STATUS = {"busy": ("503 Slow Down", "SlowDown"), "error": ("500 Internal Server Error", "InternalError")}


@dataclass(frozen=True)
class Outage:
    """What is broken: of a kind, from a request on that `begins` matches, the one after `passed` others, for `seconds`.

    refuse   the port is closed                      busy, error   503 SlowDown, 500 InternalError
    hang     connections are taken, not answered     cut           half of an upload is read, then the line is cut
    mute     requests are done, not answered         slow          each request waits for a second
    A `share` of the requests is struck, drawn by `seed`. `begins` is a regular expression on "METHOD /path".
    """

    number: int
    kind: str
    begins: str = ""
    passed: int = 0
    seconds: float = 0.0
    share: float = 1.0
    seed: int = 0


class Proxy:
    """One listening port, its connections and the outage that is on."""

    def __init__(self, port: int, upstream: int, faults: Path, log: Path) -> None:
        self.port, self.upstream, self.faults, self.log = port, upstream, faults, log.open("a")
        self.outage: Outage | None = None
        self.begun_s: float | None = None
        self.matched = 0
        self.dice = random.Random(0)
        self.writers: set[asyncio.StreamWriter] = set()
        self.closing = asyncio.Event()

    async def serve(self) -> None:
        """For ever; the port is closed while connections are to be refused."""
        while True:
            server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=HEAD_BYTES)
            await self.closing.wait()
            server.close()
            for writer in list(self.writers):
                writer.transport.abort()
            assert self.outage is not None
            await asyncio.sleep(self.outage.seconds)
            self.closing.clear()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client is gone, or was thrown out
        finally:
            self.writers.discard(writer)
            writer.transport.abort() if self.closing.is_set() else writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request to its end. Whether the connection is open for another."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, target, _ = head.split("\r\n", 1)[0].split(" ", 2)
        headers = dict(re.findall(r"(?m)^([^:\r\n]+):[ \t]*([^\r\n]*)", head.partition("\r\n")[2].lower()))
        kind = self._struck(f"{method} {target}")
        began_s = time.time()
        if "100-continue" in headers.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "cut" and method in ("PUT", "POST"):
            await reader.readexactly(int(headers.get("content-length", 0)) // 2)
        body = b"" if kind == "cut" else await _body(reader, headers)
        status = await self._answer(kind, method, target, head, body, writer)
        row = {"time": began_s, "method": method, "target": target, "bytes": len(body), "struck": kind}
        self.log.write(json.dumps(row | {"status": status, "seconds": round(time.time() - began_s, 4)}) + "\n")
        self.log.flush()
        return status > 0 and kind not in STATUS

    async def _answer(
        self, kind: str, method: str, target: str, head: str, body: bytes, writer: asyncio.StreamWriter
    ) -> int:
        """Answer as the outage says. The status that the client is given, 0 for none."""
        if kind == "refuse":
            self.closing.set()
            return 0
        if kind == "hang":
            await asyncio.sleep(max(0.0, self._left_s()))
        if kind in ("hang", "cut"):
            writer.transport.abort()
            return 0
        if kind in STATUS:
            line, code = STATUS[kind]
            text = "" if method == "HEAD" else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
            writer.write(REPLY.format(status=line, size=len(text), body=text).encode())
            await writer.drain()
            return int(line[:3])
        if kind == "slow":
            await asyncio.sleep(1.0)
        answer_head, answer = await self._forward(method, target, head, body)
        if kind == "mute":
            writer.transport.abort()
            return 0
        writer.write(answer_head + answer)
        await writer.drain()
        return int(answer_head.split(b" ", 2)[1])

    async def _forward(self, method: str, target: str, head: str, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        kept = [
            line
            for line in head.split("\r\n")[1:-2]
            if line.split(":")[0].lower() not in ("content-length", "transfer-encoding", "connection", "expect")
        ]
        # of HTTP 1.0, so that the answer ends with its connection and comes in no chunks
        lines = [f"{method} {target} HTTP/1.0", *kept, f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, "\r\n"]).encode("latin-1") + body)
        await writer.drain()
        whole = await reader.read()
        writer.close()
        answer_head, _, answer = whole.partition(b"\r\n\r\n")
        first, *fields = answer_head.split(b"\r\n")
        dropped = (b"connection",) if method == "HEAD" else (b"connection", b"content-length")
        fields = [field for field in fields if field.split(b":")[0].lower() not in dropped]
        if method != "HEAD":
            fields.append(b"Content-Length: %d" % len(answer))
        return b"\r\n".join([b"HTTP/1.1 " + first.split(b" ", 1)[1], *fields, b"", b""]), answer

    def _struck(self, line: str) -> str:
        """The kind of outage that this request meets; empty for none."""
        text = self.faults.read_text() if self.faults.exists() else ""
        found = Outage(**json.loads(text)) if text else None
        if found != self.outage:
            self.outage, self.begun_s, self.matched = found, None, 0
            self.dice = random.Random(found.seed if found else 0)
        if found is None:
            return ""
        if self.begun_s is None:
            self.matched += re.search(found.begins, line) is not None
            if self.matched <= found.passed:
                return ""
            self.begun_s = time.monotonic()
            self._note("begins", line)
        if self._left_s() <= 0:
            return ""
        first = self.matched == found.passed + 1
        self.matched += 1
        return found.kind if first or self.dice.random() < found.share else ""

    def _left_s(self) -> float:
        assert self.outage is not None
        assert self.begun_s is not None
        return self.begun_s + self.outage.seconds - time.monotonic()

    def _note(self, what: str, line: str) -> None:
        assert self.outage is not None
        row: dict[str, Any] = {"time": time.time(), "outage": self.outage.number, "event": what, "at": line}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" not in headers.get("transfer-encoding", ""):
        return await reader.readexactly(int(headers.get("content-length", 0)))
    pieces = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return b"".join(pieces)


if __name__ == "__main__":
    asyncio.run(Proxy(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])).serve())
