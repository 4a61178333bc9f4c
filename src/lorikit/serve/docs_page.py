"""/docs: Swagger UI from files of this machine (the package fastapi-swagger), for servers that reach no other host."""

from __future__ import annotations

import importlib.util
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

from lorikit.serve.protocol import ApiError

_PACKAGE = "fastapi_swagger"
_FILES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
}


def add_docs(app: FastAPI) -> None:
    """The page and its three files, which are no part of the OpenAPI document."""

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """Try the routes in a browser."""
        if importlib.util.find_spec(_PACKAGE) is None:
            raise ApiError(404, "the page needs fastapi-swagger: pip install 'lorikit[serve]'. See /openapi.json")
        root = request.scope.get("root_path", "").rstrip("/")
        script, style, icon = (f"{root}/docs/{name}" for name in _FILES)
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title="Lorikit",
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
            swagger_ui_parameters={"validatorUrl": None},  # else the document's address is sent to validator.swagger.io
        )

    @app.get("/docs/{name}", include_in_schema=False)
    async def docs_file(name: str) -> Response:
        """One of the files of the page."""
        if name not in _FILES or importlib.util.find_spec(_PACKAGE) is None:
            raise ApiError(404, "Not Found")
        content = (resources.files(_PACKAGE) / "resources" / name).read_bytes()
        return Response(content, media_type=_FILES[name], headers={"Cache-Control": "max-age=86400"})
