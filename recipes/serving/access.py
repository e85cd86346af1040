"""Access control: keys, hosts, origins of pages, and the content type."""

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from retention_gates.recipes.serving.chat import Refused
from retention_gates.recipes.serving.responses import error_object

if TYPE_CHECKING:  # of the extra "serve"
    from starlette.datastructures import Headers

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health",)  # needs no key
METHODS = "GET, HEAD, POST, OPTIONS"


@dataclass(frozen=True)
class Rules:
    """The conditions that a request must meet.

    Args:
        keys: one of them as a bearer token; none: no key is needed.
        origins: of web pages that may ask, such as https://chat.example; "*" is all.
        hosts: names that the server may be called by; None: any. A page whose name was made to mean this machine
            (DNS rebinding) calls it by its own.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = LOCAL


class Access:
    """Lets requests through to the application, or refuses them before anything of their bodies is read."""

    def __init__(self, app: Any, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse, Response

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope), scope["method"], scope["path"])
        except Refused as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            answer: Any = JSONResponse(error_object(error), status_code=error.status, headers=headers)
        else:
            answer = self.app
            if scope["method"] == "OPTIONS":
                answer = Response(status_code=204, headers={"Allow": METHODS})
        await answer(scope, receive, send)

    def _check(self, headers: "Headers", method: str, path: str) -> None:
        host = headers.get("host", "")
        if self.rules.hosts is not None and _name(host) not in self.rules.hosts:
            raise Refused(403, f"This server is not called {host!r}: see --allowed-host.", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self._is_welcome(origin, host):
            raise Refused(403, f"Pages of {origin!r} may not ask here: see --cors-origin.", code="origin_not_allowed")
        if method == "OPTIONS":
            return
        if self.rules.keys and path not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode() if scheme.lower() == "bearer" else b""
            if not any(secrets.compare_digest(given, one.encode()) for one in self.rules.keys):
                raise Refused(401, "The API key is missing or wrong.", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":  # what a page may send anywhere without asking
            raise Refused(415, f"Content-Type {kind!r} must be application/json.", code="unsupported_media_type")

    def _is_welcome(self, origin: str, host: str) -> bool:
        return "*" in self.rules.origins or origin in self.rules.origins or urlsplit(origin).netloc == host


def _name(host: str) -> str:
    """The host without its port, in small letters; of an IPv6 address without brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
