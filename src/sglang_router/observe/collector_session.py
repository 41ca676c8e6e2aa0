"""How a collector of traces is asked over HTTP: what it answers is read as far as anybody needs it, and no further.

The exporter reads an answer whole, however long it is, and goes where a redirect leads, with the headers that hold the
collector's credentials. An address where something else listens must not cost memory, nor hand them on.
"""

from __future__ import annotations

import io
from typing import Any, Final

import requests

_MOST: Final = 65536
"""Bytes of an answer."""


class CollectorSession(requests.Session):
    """See the module."""

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send a request; return the answer, of which at most `_MOST` bytes were read.

        Raises: requests.RequestException
        """
        answer = super().send(request, **{**kwargs, "stream": True, "allow_redirects": False})
        if 300 <= answer.status_code < 400:
            answer.close()
            raise requests.TooManyRedirects(f"{request.url} redirects, which is not followed", response=answer)
        content = answer.raw.read(_MOST, decode_content=True)
        if len(content) == _MOST:
            answer.close()  # with its connection, in which the rest would follow
        answer.raw = io.BytesIO(content)
        return answer
