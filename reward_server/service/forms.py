"""multipart/form-data -> its parts. Bodies are whole in memory and bounded before they come here.

Own code, because the usual parser copies what it passes on in small pieces; here the boundary is
searched for in C, once.
"""

from email.message import Message


class FormError(ValueError):
    """The body is not the form that its header announces."""


def parts_of(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return name -> content of each part (RFC 7578). Raises FormError.

    By hand, boundary b: `--b`, `Content-Disposition: form-data; name="a"`, an empty line, `hi`,
    `--b--` -> {"a": b"hi"}.
    """
    boundary = _parameter(content_type, "boundary", "content-type")
    if not boundary:
        raise FormError("the header `Content-Type` must name the boundary of multipart/form-data.")
    line = b"\r\n--" + boundary.encode("latin-1", "replace")
    found = (b"\r\n" + body).split(line)
    if len(found) < 2 or not found[-1].startswith(b"--"):
        raise FormError("the body must end in the boundary that its `Content-Type` names.")
    parts: dict[str, bytes] = {}
    for part in found[1:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        name = _name(head)
        if not separator or not name or name in parts:
            raise FormError(f"each part must have a name of its own. Got {name!r}.")
        parts[name] = content
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
