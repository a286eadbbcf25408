"""Ask a service on this machine how it is.

Ring: edge (loopback).
"""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


def get_json(url: str, *, key: str = "") -> tuple[int, dict[str, Any]]:  # Any: JSON
    """GET without proxies; (0, {}) when nothing answers, {} when the body is no JSON object."""
    parts, status = urlsplit(url), 0
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        status, data = response.status, response.read()
        body = json.loads(data or b"{}")
        return status, body if isinstance(body, dict) else {}
    except ValueError:
        return status, {}
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()
