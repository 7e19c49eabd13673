"""A reverse proxy in front of an S3 server that injects the faults of a network, seeded and counted.

    python tests/chaos/proxy.py --upstream http://127.0.0.1:8333 --port 9000 --control_port 9001
    export AWS_ENDPOINT_URL=http://127.0.0.1:9000

Host header, path and query reach the server as the client sent them, so signatures (SigV4) stay valid. It begins as a plain
proxy. The control address, a port of its own, so that every path of the proxy belongs to S3:

    POST /plan   {"faults": {"slow_down": 5, "stall": 1}, "rate": 0.2, "seed": 0, "pace": 200000}
                 what to inject from now on; pace: bytes per second of every download, 0 = no limit
    POST /pace   {"pace": 0}    the pace alone
    GET  /report                what was done since the plan came, as JSON; bytes downloaded and uploads by path

faults.py says what the kinds are.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from faults import SLOW_S, STALL_S, Fault, FaultPlan
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

_HOST = "127.0.0.1"
# Of one connection only; the upload was already invited to come, so the server is not asked again.
_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
_PIECE_BYTES = 64 << 10
_SLOW_PIECES = 12
_AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")  # headers aiohttp would add
_SLOW_DOWN = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    "</Message><RequestId>chaos</RequestId></Error>"
)


class BrokenError(Exception):
    """The connection to the client is to end here. reset: by a TCP reset, not in order."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__(reset)
        self.reset = reset


class FaultProxy:
    """Forwards requests and hurts some. `plan` and `pace` may be replaced at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.plan, self.pace = upstream.rstrip("/"), FaultPlan(), 0.0
        self.downloaded: Counter[str] = Counter()  # bytes by path, also of downloads that broke
        self.uploads: Counter[str] = Counter()  # whole objects by path, those that the server took
        self.session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of a client."""
        fault = self.plan.draw(request.method, request.raw_path)
        try:
            if fault is None:
                return await self._forward(request, None)
            return await self._hurt(request, fault)
        except BrokenError as broken:
            _break(request, reset=broken.reset)
        except aiohttp.ClientConnectionError:  # the server is down: the client sees a connection that breaks as well
            _break(request, reset=True)
        raise asyncio.CancelledError  # there is nobody to answer any more

    async def _hurt(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.kind in ("slow_down", "burst"):
            await request.read()  # a server that is busy has read the upload; cut off, the client would not see the 503
            self.plan.record(fault)
            headers = {"Content-Type": "application/xml"}
            return web.Response(status=503, text=None if request.method == "HEAD" else _SLOW_DOWN, headers=headers)
        if fault.kind == "reset_before":
            self.plan.record(fault)
            raise BrokenError(reset=True)
        if request.method == "PUT" and fault.kind == "reset_in_body":
            await self._half_upload(request, fault)
            return await self._forward(request, None)  # an upload without halves
        return await self._forward(request, fault)

    async def _half_upload(self, request: web.Request, fault: Fault) -> None:
        """Send half of an upload on, then break both connections: the server must not keep half an object."""
        data = await request.read()
        if len(data) < 2:
            self.plan.give_back(fault)
            return

        async def half() -> AsyncIterator[bytes]:
            yield data[: len(data) // 2]
            await asyncio.sleep(0.2)
            raise BrokenError(reset=True)

        self.plan.record(fault)
        try:
            async with self._request(request, half()):
                raise BrokenError(reset=True)  # a server that answers half an upload is no better
        except aiohttp.ClientError:
            raise BrokenError(reset=True) from None

    def _request(
        self, request: web.Request, body: AsyncIterator[bytes] | bytes | None
    ) -> aiohttp.client._RequestContextManager:
        assert self.session is not None
        url = URL(self.upstream + request.raw_path, encoded=True)
        headers = _kept(request.headers)
        return self.session.request(request.method, url, headers=headers, data=body, allow_redirects=False)

    async def _forward(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        if fault and fault.kind == "slow" and request.method == "PUT":
            self.plan.record(fault)
            await asyncio.sleep(SLOW_S)  # the client has sent all, and waits for the reply
            fault = None
        body = await request.read() if request.body_exists else None
        async with self._request(request, body) as reply:
            part_of_more = "uploadId" in request.query
            if reply.status == 200 and (request.method, part_of_more) in (("PUT", False), ("POST", True)):
                self.uploads[request.path] += 1
            if fault and (fault.kind == "lost_reply" or (fault.kind == "stall" and request.method != "GET")):
                await reply.read()
                self.plan.record(fault)
                await asyncio.sleep(STALL_S if fault.kind == "stall" else 0)
                raise BrokenError(reset=True)
            return await self._pass_on(request, reply, fault)

    async def _pass_on(
        self, request: web.Request, reply: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        """Send the server's reply to the client, with a fault in its body if there is one to do."""
        answer = web.StreamResponse(status=reply.status, reason=reply.reason, headers=_kept(reply.headers))
        data = b"" if request.method == "HEAD" else await reply.read()
        if request.method != "HEAD" and reply.status not in (204, 304):
            answer.content_length = len(data)
        if fault and len(data) < 2:
            self.plan.give_back(fault)
            fault = None
        await answer.prepare(request)
        if fault is None:
            await self._paced(answer, data, request.path)
        elif fault.kind == "slow":
            self.plan.record(fault)
            await _trickle(answer, data)
            self.downloaded[request.path] += len(data)
        else:
            await answer.write(data[: len(data) // 2])
            self.downloaded[request.path] += len(data) // 2
            self.plan.record(fault)
            await asyncio.sleep(STALL_S if fault.kind == "stall" else 0)
            raise BrokenError(reset=fault.kind != "truncated")
        await answer.write_eof()
        return answer

    async def _paced(self, answer: web.StreamResponse, data: bytes, path: str) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            await answer.write(piece)
            self.downloaded[path] += len(piece)
            if self.pace > 0 and len(data) > _PIECE_BYTES:
                await asyncio.sleep(len(piece) / self.pace)

    async def control_plan(self, request: web.Request) -> web.Response:
        """Take a new plan; an unknown kind is a 400 that lists the known ones."""
        value = await request.json()
        try:
            self.plan = FaultPlan.from_json(value)
        except ValueError as error:
            return web.Response(status=400, text=str(error))
        self.pace = float(value.get("pace", 0.0))
        self.downloaded.clear()
        self.uploads.clear()
        return web.json_response({})

    async def control_pace(self, request: web.Request) -> web.Response:
        """Take a new pace."""
        self.pace = float((await request.json())["pace"])
        return web.Response()

    async def control_report(self, _request: web.Request) -> web.Response:
        """Say what was done, and what went through."""
        traffic = {"downloaded": dict(self.downloaded), "uploads": dict(self.uploads)}
        return web.json_response({**self.plan.report(), **traffic})


def _kept(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP)


async def _trickle(answer: web.StreamResponse, data: bytes) -> None:
    size = -(-len(data) // _SLOW_PIECES)
    for start in range(0, len(data), size):
        await answer.write(data[start : start + size])
        await asyncio.sleep(SLOW_S / _SLOW_PIECES)


def _break(request: web.Request, *, reset: bool) -> None:
    transport = request.transport
    if transport is None:
        return
    if reset:
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() then sends RST
        transport.abort()
    else:
        transport.close()


async def start(upstream: str, port: int, control_port: int) -> tuple[FaultProxy, list[web.AppRunner]]:
    """Serve until the returned runners are cleaned up. Ports of 0 are chosen by the system."""
    proxy = FaultProxy(upstream)

    async def session(_app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a restarted server finds no stale connections
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=_AUTOMATIC
        ) as proxy.session:
            yield

    data = web.Application(client_max_size=1 << 30)
    data.router.add_route("*", "/{path:.*}", proxy.handle)
    data.cleanup_ctx.append(session)
    control = web.Application()
    control.router.add_post("/plan", proxy.control_plan)
    control.router.add_post("/pace", proxy.control_pace)
    control.router.add_get("/report", proxy.control_report)
    runners = []
    for app, wanted in ((data, port), (control, control_port)):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, _HOST, wanted).start()
        runners.append(runner)
    return proxy, runners


async def _serve(arguments: argparse.Namespace) -> None:
    _, runners = await start(arguments.upstream, arguments.port, arguments.control_port)
    try:
        await asyncio.Event().wait()
    finally:
        for runner in runners:
            await runner.cleanup()


def main() -> None:
    """Read the command line and serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upstream", required=True, help="URL of the S3 server")
    parser.add_argument("--port", type=int, required=True, help="port of the proxy, on 127.0.0.1")
    parser.add_argument("--control_port", type=int, required=True, help="port for plans and reports, on 127.0.0.1")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
