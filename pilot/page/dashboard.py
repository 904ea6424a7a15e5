"""The server of `pilot dashboard`: the page of a run that goes, for whom may see it. Read-only.

Pages come from files alone, so it works while no server leads the run. Starlette, which Flower brings along,
speaks HTTP; a token, where one is needed, comes once in the address and then stays in a cookie.
"""

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote, urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilot.page.live import Runs, View
from pilot.page.markup import Markup, element
from pilot.page.page import Content, document, part_of_page, policy
from pilot.page.story import NoStory

_BEGINNING = element("header", element("h1", "The events are being read."), class_="top")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": policy("'self'", "; connect-src 'self'; frame-ancestors 'none'"),
}


class Guard:
    """Lets through who knows the token; without one, who asks this machine for this machine.

    The latter since a web page of elsewhere may make a browser ask here under a name of its own.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, secure: bool) -> None:
        self._app, self._token, self._secure = app, token, secure
        # what the cookie holds is not the token, and its name differs from that of another dashboard's
        self._pass = hashlib.sha256(f"cookie {token}".encode()).hexdigest()
        self._cookie = f"pilot_{hashlib.sha256(self._pass.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = self._refusal(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [
                    (name.encode(), value.encode())
                    for name, value in {**_HEADERS, "cache-control": "no-store"}.items()
                    if name.encode() not in own
                ]
            await send(message)

        await (answer or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The dashboard only shows.", 405)
        if self._token is None:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            if host in _LOCAL_NAMES:
                return None
            return PlainTextResponse("Ask for localhost or 127.0.0.1.", 421)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if given and _same(given[0], self._token):
            return self._admission(quote(scope["path"], safe="/"))
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(credentials.strip(), self._token):
            return None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            cookie = None
        if cookie is not None and _same(cookie.value, self._pass):
            return None
        what = "Open the address with the token that pilot dashboard has printed."
        return PlainTextResponse(what, 401, {"www-authenticate": "Bearer"})

    def _admission(self, path: str) -> Response:
        """To the same page, without the token in its address."""
        answer = Response(status_code=303, headers={"location": "/" + path.lstrip("/")})
        answer.set_cookie(
            self._cookie, self._pass, httponly=True, samesite="strict", secure=self._secure
        )
        return answer


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def dashboard(
    runs: Runs, script: str, *, token: str | None, secure: bool = False, first: str = ""
) -> Starlette:
    """The application. `script` draws charts; `token` None: for this machine; `first`: the run at "/"."""
    files = {name: part_of_page(name) for name in ("page.js", "live.js")} | {"vega.js": script}

    def home(request: Request) -> Response:
        names = runs.names()
        name = first or (names[0] if names else "")
        return show(name) if name else PlainTextResponse("There is no run yet.", 404)

    def show(name: str) -> Response:
        try:
            view = _view(runs, name)
        except NoStory as error:
            return PlainTextResponse(f"{error}.", 404)
        return HTMLResponse(_document(view, name))

    def data(request: Request) -> Response:
        try:
            view = _view(runs, request.path_params["name"])
        except NoStory as error:
            return PlainTextResponse(f"{error}.", 404)
        if view.shown is None:
            return JSONResponse({"behind": view.behind})
        tag = f'"{view.version}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        shown = {"body": view.shown.body, "figures": view.shown.figures}
        title = f"{view.shown.title} · Pilot"
        return JSONResponse(
            {"version": view.version, "title": title, **shown}, headers={"etag": tag}
        )

    def static(request: Request) -> Response:
        body = files.get(request.path_params["name"])
        if body is None:
            return PlainTextResponse("There is no such file.", 404)
        kept = {"cache-control": "private, max-age=3600"}
        return Response(body, media_type="text/javascript", headers=kept)

    routes = [
        Route("/", home),
        Route("/run/{name}", lambda request: show(request.path_params["name"])),
        Route("/data/{name}", data),
        Route("/files/{name}", static),
    ]
    guard = Middleware(Guard, token=token, secure=secure)
    app = Starlette(routes=routes, middleware=[guard])
    app.router.redirect_slashes = False  # an address is right or wrong
    return app


def _view(runs: Runs, name: str) -> View:
    live = runs.find(name)
    if live is None:
        raise NoStory("There is no such run")
    return live.view(runs.links(name))


def _document(view: View, name: str) -> str:
    shown = view.shown or Content(name, _BEGINNING, {})
    status = element("p", "Live.", class_="live", id="live", role="status", data_state="live")
    body = Markup(status + element("div", shown.body, id="page"))
    scripts = [
        element("script", src=f"/files/{name}") for name in ("vega.js", "page.js", "live.js")
    ]
    attributes = {"data-live": f"/data/{quote(name)}", "data-version": view.version}
    allowed = policy("'self'", "; connect-src 'self'")
    return document(Content(shown.title, body, shown.figures), allowed, scripts, attributes)
