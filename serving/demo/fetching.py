"""Pictures by URL. A page that others see must not fetch for them what only this machine can reach."""

import ipaddress
import socket
from urllib.parse import urlsplit

import httpx


INTERNET = ipaddress.ip_network(
    "2000::/3"
)  # all of IPv6 that is handed out; the rest stands for something else, as IPv4


def is_public(address: str) -> bool:
    """Whether an IP address can only be one that everybody reaches."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in INTERNET or ip.sixtofour is not None):
        return False
    return ip.is_global and not ip.is_multicast


class _PublicOnly(httpx.HTTPTransport):
    """Connects to public addresses alone, and to the very address that was looked at; redirects come through here, too."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        try:
            entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"there is no host {host}") from error
        found = list(dict.fromkeys(entry[4][0] for entry in entries))  # those that this machine reaches best come first
        if not all(map(is_public, found)):
            raise httpx.ConnectError(f"{host} is not a public address")
        for index, address in enumerate(found):
            # A request of its own: from the given one, redirects take the name of the host.
            to_address = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return super().handle_request(to_address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if index == len(found) - 1:
                    raise
        raise httpx.ConnectError(f"there is no host {host}")


def fetch(url: str, most_bytes: int, public_only: bool) -> tuple[bytes, str]:
    """What a URL leads to, and the name of the file.

    Raises:
        ValueError: it is no http or https URL, cannot be had, or is larger than `most_bytes`.
    """
    try:
        parts = urlsplit(url.strip())
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # brackets around what is no address
        is_url = False
    if not is_url:
        raise ValueError(f"{url.strip()[:200]!r} is no URL of a picture: it begins with http:// or https://.")
    content = bytearray()
    try:
        client = httpx.Client(transport=_PublicOnly() if public_only else None, follow_redirects=True, timeout=30)
        with client, client.stream("GET", url.strip(), headers={"User-Agent": "m3-demo"}) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > most_bytes:
                    raise ValueError(
                        f"{url.strip()} leads to more than {most_bytes / 1e6:g} MB: give a smaller picture."
                    )
    except httpx.HTTPStatusError as error:
        raise ValueError(f"{url.strip()} cannot be had: the server answered {error.response.status_code}.") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last for names longer than a name may be
        raise ValueError(f"{url.strip()} cannot be had: {str(error) or type(error).__name__}.") from error
    return bytes(content), parts.path.rpartition("/")[2] or "picture"
