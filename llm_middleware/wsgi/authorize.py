"""A host's own login as ``authorize=``: a function of the neutral request, or one that reads Flask's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from ..api.message import Head

__all__ = ["in_flask"]


def in_flask(app: Any, function: Callable[[], object]) -> Callable[[Head], object]:
    """``function`` as ``authorize=``, run where ``flask.request``, ``flask.session`` and ``g`` are those of
    the request, but for its body, which is not read yet; ``app``: the host's Flask app. It returns a
    `KeyRecord`; None, ``abort(401)`` and ``abort(403)`` refuse. What it puts into the session is not kept::

        llm_app("config.yaml", authorize=in_flask(app, current_key))
    """

    def authorize(head: Head) -> object:
        environ = {**head.native, "wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0"}
        with app.request_context(environ):
            return app.ensure_sync(function)()

    return authorize
