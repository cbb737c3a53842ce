"""The image files in a request: its body, or the parts of a form."""

import sys
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from vit_jax.errors import brief
from vit_jax.printable import printable
from vit_jax.serving.limits import Refusal

_HOW = "send an image with Content-Type: image/jpeg or its like, or files as multipart/form-data"
_FORM = "multipart/form-data"
_BYTES = "application/octet-stream"


class Upload(NamedTuple):
    """An image file: its name, escaped, None for a body without one, and its content."""

    name: str | None
    content: bytes


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # The body is bounded, and the disk may be read-only.


async def read(request: Request, max_files: int) -> list[Upload]:
    """Reads the files of a request, one at least.

    Args:
        request: whose body was not read yet.
        max_files: in a form, at most.

    Raises:
        Refusal: there is no file, there are too many, or the body is of another type.
    """
    if encoding := request.headers.get("content-encoding"):
        raise Refusal(415, f"Content-Encoding is {brief(encoding)}: send the image as it is")
    given = request.headers.get("content-type", _BYTES)
    kind = given.partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _read_form(request, max_files)
    if not (kind.startswith("image/") or kind == _BYTES):
        raise Refusal(415, f"Content-Type {brief(given)} is no image: {_HOW}")
    if not (body := await request.body()):
        raise Refusal(400, f"the body is empty: {_HOW}")
    return [Upload(None, body)]


async def _read_form(request: Request, max_files: int) -> list[Upload]:
    parser = _InMemory(request.headers, request.stream(), max_files=max_files, max_fields=max_files)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(
            400,
            f"the form cannot be read ({error.message.rstrip('.')}): send at most {max_files} "
            "files, as multipart/form-data with a boundary",
        ) from error
    try:
        parts = form.multi_items()
        for field, value in parts:
            if not isinstance(value, UploadFile):
                raise Refusal(
                    400,
                    f"field {brief(field)} is text, not a file: with curl, -F image=@photo.jpg; "
                    "options go into the address",
                )
        uploads = [
            Upload(printable(value.filename or field), await value.read())
            for field, value in parts
            if isinstance(value, UploadFile)
        ]
    finally:
        await form.close()
    if not uploads:
        raise Refusal(400, f"the form has no file: {_HOW}")
    return uploads
