"""Where a remote run goes and how long it may take. The key stays in here: it is sent, never shown."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from tl_persona.errors import InputError

HOSTED = "https://api.ndif.us"
"""NDIF's own server."""


@dataclass(frozen=True)
class RemoteSettings:
    """The settings of one remote model.

    Attributes:
        host: Base URL of the server.
        api_key: Sent with every request to the host; kept out of representations, messages and files.
        timeout: Seconds that one group of samples may take, waiting and retries included.
        allow_http: True lets texts, key and results travel unencrypted to a host that is not this machine.
        group_tokens: Tokens of one request, each shared one counted once: what a failure costs.
        first_wait: Seconds before the first retry; doubled, with jitter, for each further one.
        longest_wait: Seconds between two retries at most.
        poll: Seconds between two looks at a job at most.

    Raises:
        InputError: A host that is no URL, plain http to another machine, or a limit that is not positive.

    Example:
        >>> RemoteSettings(host="http://127.0.0.1:5001", api_key="secret").host
        'http://127.0.0.1:5001'
        >>> "secret" in repr(RemoteSettings(api_key="secret"))
        False
    """

    host: str = HOSTED
    api_key: str = field(default="", repr=False)
    timeout: int | float = 1800.0
    allow_http: bool = False
    group_tokens: int = 8192
    first_wait: float = 1.0
    longest_wait: float = 60.0
    poll: float = 2.0

    def __post_init__(self) -> None:
        for name in ("timeout", "group_tokens", "first_wait", "longest_wait", "poll"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0, got {getattr(self, name)}")
        check_url(self.host, allow_http=self.allow_http)
        object.__setattr__(self, "host", self.host.rstrip("/"))

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        host: str | None = None,
        timeout: int | float | None = None,
        allow_http: bool = False,
    ) -> "RemoteSettings":
        """The settings of `NDIF_HOST` and `NDIF_API_KEY`; what is given goes before them."""
        chosen = host or environment.get("NDIF_HOST") or HOSTED
        key = environment.get("NDIF_API_KEY", "")
        seconds = cls.timeout if timeout is None else timeout
        return cls(host=chosen, api_key=key, allow_http=allow_http, timeout=seconds)


def check_url(url: str, *, allow_http: bool) -> None:
    """Refuses a URL that texts, keys and results should not travel over.

    Raises:
        InputError: No http(s) URL, or plain http to a machine that is not this one.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        raise InputError(f"{_shown(url)!r} is no http or https address: give one such as {HOSTED}")
    if parts.username or parts.password:
        raise InputError("the server's address holds a user name or password: give the key in NDIF_API_KEY")
    if parts.scheme == "http" and not allow_http and not _is_this_machine(parts.hostname or ""):
        raise InputError(
            f"{_shown(url)!r} is plain http to another machine: anybody on the way could read the key and replace "
            "the results; use https, or allow it explicitly (allow_http=True, --allow-http)"
        )


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(url: str) -> str:
    """An address without what may be secret in it."""
    return url.split("?", 1)[0].rpartition("@")[2]
