"""The page for trying the model out, at `/`, and the page of the routes, at `/docs`: files of this package only."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).with_name("page_files")
# Nothing from elsewhere is loaded, and nobody puts the page into a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the pages and their files."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(FOLDER / "index.html", headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(FOLDER / "docs.html", headers=_HEADERS)

    app.mount("/page", StaticFiles(directory=FOLDER), name="page")
