"""Pictures by URL. A page that others see must not fetch for them what only this machine can reach."""

import ipaddress
import socket
from urllib.parse import urlsplit

import httpx


class _PublicOnly(httpx.HTTPTransport):
    """Connects to public addresses alone, and to the very address that was looked at; redirects come through here, too."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except OSError as error:
            raise httpx.ConnectError(f"there is no host {host}") from error
        if not all(ipaddress.ip_address(address).is_global for address in found):
            raise httpx.ConnectError(f"{host} is not a public address")
        request.url = request.url.copy_with(host=sorted(found)[0])
        request.extensions = {**request.extensions, "sni_hostname": host}
        return super().handle_request(request)


def fetch(url: str, most_bytes: int, public_only: bool) -> tuple[bytes, str]:
    """What a URL leads to, and the name of the file.

    Raises:
        ValueError: it is no http or https URL, cannot be had, or is larger than `most_bytes`.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
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
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url.strip()} cannot be had: {str(error) or type(error).__name__}.") from error
    return bytes(content), parts.path.rpartition("/")[2] or "picture"
