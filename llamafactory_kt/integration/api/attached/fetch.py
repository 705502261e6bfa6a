"""Downloads for requests that name a web address: from the public internet alone, and never more than a limit.

LLaMA-Factory's ``check_ssrf_url`` looks at one address of a name, and the download then asks for the name again, follows redirects
anywhere, and ends neither by time nor by size. Here every connection, those after a redirect too, goes to the very address that was
checked. Proxies of the environment are not used: they would look names up themselves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

from ..errors import BadRequest

SECONDS = 30
"""for a whole download"""
_REDIRECTS = 5


def fetch(url: str, limit: int) -> bytes:
    """What is at a web address.

    Args:
        url: http or https.
        limit: bytes at most.

    Raises:
        BadRequest: The address is not a public one, or there is no such thing, or it is too large or too slow.
    """
    return asyncio.run(_fetch(url, limit))  # only there do all steps together have a deadline


async def _fetch(url: str, limit: int) -> bytes:
    try:
        async with (
            asyncio.timeout(SECONDS),
            httpx.AsyncClient(
                transport=_Public(), timeout=SECONDS, follow_redirects=True, max_redirects=_REDIRECTS, trust_env=False
            ) as client,
            # a compressed body could grow to any size in one step; pictures are compressed as they are
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            if not answer.is_success:
                raise BadRequest(f"The server of {_short(url)} answered with status {answer.status_code}.", "messages")
            data = bytearray()
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > limit:
                    raise BadRequest(f"{_short(url)} is larger than {limit >> 20} MiB.", "messages")
            return bytes(data)
    except TimeoutError:
        raise BadRequest(f"{_short(url)} took longer than {SECONDS} seconds.", "messages") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise BadRequest(f"{_short(url)} cannot be read: {type(error).__name__}.", "messages") from error


class _Public(httpx.AsyncBaseTransport):
    """Connects to checked addresses; the name stays in the ``Host`` header and in the certificate."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; a redirect is another one."""
        url = request.url
        if url.scheme not in ("http", "https") or not url.host:
            raise BadRequest("Only HTTP/HTTPS URLs are allowed.", "messages")
        address = public_address(url.host, url.port or {"http": 80, "https": 443}[url.scheme])
        return await self._inner.handle_async_request(
            httpx.Request(
                request.method, url.copy_with(host=address), headers=request.headers,
                extensions={**request.extensions, "sni_hostname": url.raw_host.decode()},
            )
        )  # fmt: skip

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


def public_address(host: str, port: int) -> str:
    """The first address of a name.

    Raises:
        BadRequest: There is none, or one of them is not for the public internet.
    """
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise BadRequest(f"Could not resolve hostname: {_short(host)}", "messages") from None
    if not all(map(is_public, found)):
        raise BadRequest("Access to private or reserved IP addresses is not allowed.", "messages")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, as does the IPv4 address inside it, if any.

    >>> [is_public(a) for a in ("8.8.8.8", "127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::")]
    [True, False, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return _is_public_ipv4(ip)
    if ip.ipv4_mapped is not None:
        return _is_public_ipv4(ip.ipv4_mapped)
    if ip in _NAT64:
        return _is_public_ipv4(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if ip not in _UNICAST or ip in _DOCUMENTATION or not ip.is_global:
        return False
    inner = [ip.sixtofour, *(ip.teredo or ())]
    return all(_is_public_ipv4(one) for one in inner if one is not None)


def _is_public_ipv4(ip: ipaddress.IPv4Address) -> bool:
    return ip.is_global and not ip.is_multicast and ip not in _PROTOCOLS


# What Python knows of these depends on its version.
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")
"""IETF protocol assignments, RFC 6890"""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052"""
_UNICAST = ipaddress.ip_network("2000::/3")
"""all that IANA has given away of IPv6's unicast addresses; beside it stand other ways to write IPv4 addresses"""
_DOCUMENTATION = ipaddress.ip_network("3fff::/20")
"""RFC 9637"""


def _short(text: str) -> str:
    return ascii(text[:100])
