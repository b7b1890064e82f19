"""The web server of a study: the rating page, pictures, votes. No cookies, no accounts, nothing from other hosts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from lora_dae.study.limit import RateLimit
from lora_dae.study.store import StudyStore, hashed

PAGES = Path(__file__).parent / "pages"
STATIC = {"study.js": "text/javascript", "study.css": "text/css"}
MAX_BODY = 2048  # bytes: a vote is much smaller
TOO_MANY = "too many requests, please wait"
FOREIGN = (
    "the request came from another page; behind a proxy, make the study with url=<the address that raters see>, or let "
    "the proxy hand the host on (nginx: proxy_set_header Host $host;)"
)
LANGUAGES = ("en", "zh")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the link is a secret
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RefusedError(Exception):
    """Becomes an answer with ``status`` and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


def build_app(store: StudyStore) -> Any:
    """The FastAPI application over an open study."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = (PAGES / "study.html").read_text(encoding="utf-8")
    static = {name: (PAGES / name).read_bytes() for name in STATIC}
    raters = RateLimit(per_second=20, burst=80)  # of one link; a person needs about one
    strangers = RateLimit(per_second=1, burst=20)  # of one address without a valid link
    told = False  # on stderr: whoever serves can mend it, and sees no rater's page

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"error": error.reason}, error.status)

    @app.exception_handler(sqlite3.Error)
    async def not_stored(_: Request, error: sqlite3.Error) -> JSONResponse:
        return JSONResponse({"error": "the vote could not be stored, please try again"}, 503)

    def known(token: str, request: Request) -> tuple[int, bool]:
        found = store.rater(token)
        if found is None:
            stranger(request)
        elif not raters.allow(token):
            raise RefusedError(429, TOO_MANY)
        assert found is not None
        return found

    def stranger(request: Request) -> None:
        allowed = strangers.allow(request.client.host if request.client else "")
        raise (
            RefusedError(404, "there is no such link")
            if allowed
            else RefusedError(429, "too many requests, please wait")
        )

    async def body(request: Request) -> dict[str, Any]:
        """JSON of a request that a foreign page cannot have sent: its own header needs a preflight, which fails."""
        nonlocal told
        if request.headers.get("x-study") != "1" or "json" not in request.headers.get("content-type", ""):
            raise RefusedError(403, "the request did not come from the study's page")
        origin = request.headers.get("origin")
        # Proxies may name themselves as the host; a foreign page cannot name the study's address as its origin.
        host, own = request.headers.get("host"), store.meta.get("origin")
        if origin is not None and origin.split("://")[-1] != host and origin != own:
            if not told:
                told = True
                print(f"a rater's request from {origin!r} was refused: {FOREIGN}.", file=sys.stderr, flush=True)
            raise RefusedError(403, FOREIGN)
        data = b""
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_BODY:
                raise RefusedError(413, "the request is too large")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise RefusedError(400, "the request is no JSON object")
        return values

    def state(rater: int, token: str, consented: bool) -> dict[str, Any]:
        shared = {"title": store.meta["title"], "language": store.language(rater)}  # a reload knows nothing else
        trial = store.next_trial(rater)
        if trial is None:
            return {"state": "done", **shared}
        if not consented:
            return {"state": "consent", **shared, "total": trial["total"]}
        for side in ("left", "right", "reference"):
            trial[side] = trial[side] and f"../picture/{token}/{trial[side]}"  # the study may lie under any path
        return {"state": "trial", **shared, **trial}

    @app.get("/r/{token}")
    async def rating_page(token: str, request: Request) -> HTMLResponse:
        known(token, request)
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @app.get("/static/{name}")
    async def static_file(name: str, request: Request) -> Response:
        if name not in static:
            stranger(request)
        return Response(static[name], media_type=STATIC[name], headers={"Cache-Control": "max-age=300"})

    @app.get("/picture/{token}/{name}")
    async def picture(token: str, name: str, request: Request) -> Response:
        known(token, request)
        if name not in store.pictures:  # a list of known names, so no path can lead out of the folder
            raise RefusedError(404, "there is no such picture")
        # A name is random and never used again, so a browser need not ask twice.
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "ETag": f'"{name}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        # One hop to a thread; FileResponse takes one for every step and piece.
        data = await asyncio.to_thread((store.folder / "pictures" / name).read_bytes)
        return Response(data, media_type="image/png", headers=headers)

    @app.get("/api/{token}/next")
    async def next_trial(token: str, request: Request) -> JSONResponse:
        rater, consented = known(token, request)
        return JSONResponse(state(rater, token, consented), headers={"Cache-Control": "no-store"})

    @app.post("/api/{token}/consent")
    async def consent(token: str, request: Request) -> JSONResponse:
        rater, _ = known(token, request)
        language = (await body(request)).get("language")
        if language not in LANGUAGES:
            raise RefusedError(400, "the language is unknown")
        await asyncio.wrap_future(store.consent(rater, language))
        return JSONResponse(state(rater, token, True))

    @app.post("/api/{token}/vote")
    async def vote(token: str, request: Request) -> JSONResponse:
        rater, consented = known(token, request)
        values = await body(request)
        trial, answer, ms = (values.get(key) for key in ("trial", "answer", "ms"))
        if not consented:
            raise RefusedError(403, "the rater has not consented yet")
        if type(trial) is not int or type(ms) is not int or not 0 <= trial < 2**62 or not isinstance(answer, str):
            raise RefusedError(400, "a vote needs trial, answer and ms")
        if answer not in store.answers(rater, trial):
            raise RefusedError(400, "the trial does not take this answer")
        await asyncio.wrap_future(store.vote(trial, answer, min(max(ms, 0), 3_600_000)))
        return JSONResponse(state(rater, token, True))  # only now: the vote is on the disk

    @app.get("/admin/{token}")
    async def admin(token: str, request: Request) -> HTMLResponse:
        if hashed(token) != store.meta["admin"]:
            stranger(request)
        rows = "".join(f"<tr><td>{r + 1}<td>{done}<td>{total}" for r, done, total in store.progress())
        head = "<!doctype html><meta charset=utf-8><title>Progress</title><table><tr><th>rater<th>votes<th>of"
        return HTMLResponse(f"{head}{rows}</table>", headers={"Cache-Control": "no-store"})

    return _with_headers(app)


def _with_headers(app: Any) -> Any:
    """ASGI wrapper that adds HEADERS to every answer (FastAPI's own middleware costs a task a request)."""
    extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await app(scope, receive, send_more if scope["type"] == "http" else send)

    return wrapped
