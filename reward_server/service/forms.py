"""multipart/form-data -> its parts. Bodies are whole in memory and bounded before they come here.

Own code, because the usual parser copies what it passes on in small pieces; here the boundary is
searched for in C, once.
"""

from email.message import Message


class FormError(ValueError):
    """The body is not the form that its header announces."""


def parts_of(content_type: str, body: bytes) -> dict[str, memoryview]:
    """Return name -> content of each part (RFC 7578), not copied. Raises FormError.

    By hand, boundary b: `--b`, `Content-Disposition: form-data; name="a"`, an empty line, `hi`,
    `--b--` -> {"a": b"hi"}.
    """
    boundary = _parameter(content_type, "boundary", "content-type")
    if not boundary:
        raise FormError("the header `Content-Type` must name the boundary of multipart/form-data.")
    mark = b"\r\n--" + boundary.encode("latin-1", "replace")
    at = 0 if body.startswith(mark[2:]) else body.find(mark) + 2
    parts: dict[str, memoryview] = {}
    start = at + len(mark) - 2  # behind a boundary
    while at >= 0 and body[start : start + 2] != b"--":
        at = body.find(mark, start)
        head = body.find(b"\r\n\r\n", start, at)
        if at < 0 or head < 0:
            break
        name = _name(body[start:head])
        if not name or name in parts:
            raise FormError(f"each part must have a name of its own. Got {name!r}.")
        parts[name] = memoryview(body)[head + 4 : at]
        start = at + len(mark)
    if at < 0 or body[start : start + 2] != b"--":
        raise FormError(
            "the body must be parts that each begin with a head and the boundary of its"
            " `Content-Type`, which ends it."
        )
    return parts


def _name(head: bytes) -> str | None:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        field, _, value = line.partition(":")
        if field.strip().lower() == "content-disposition":
            return _parameter(value.strip(), "name", "content-disposition")
    return None


def _parameter(value: str, name: str, header: str) -> str | None:
    message = Message()
    message[header] = value
    found = message.get_param(name, header=header)
    return found if isinstance(found, str) else None
