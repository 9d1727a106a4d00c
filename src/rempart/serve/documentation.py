"""The API page: Swagger UI from files of its package, no other host."""

from importlib.resources import files

import flask_swagger_ui
from flask import Blueprint, Response, render_template, send_from_directory

documentation = Blueprint("documentation", __name__, url_prefix="/api/v1/docs")
_FILES = files(flask_swagger_ui) / "dist"


@documentation.get("/")
def page() -> str:
    """The page."""
    return render_template("swagger.html")


@documentation.get("/<name>")
def part(name: str) -> Response:
    """Styles and scripts of Swagger UI."""
    return send_from_directory(str(_FILES), name)
