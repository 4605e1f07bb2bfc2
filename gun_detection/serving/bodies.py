"""Request bodies, with a limit on everything: bytes, seconds, parts and fields."""

import asyncio
from collections.abc import AsyncGenerator
from math import ceil

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from gun_detection.serving.refusals import Refusal

# What a form has around its pictures: boundaries, names, a few fields.
_OVERHEAD = 2**16
_MOST_FIELDS = 8
_MOST_FIELD_BYTES = 4096


class _Parser(MultiPartParser):
    # Pictures stay in memory: what is not stored must not lie on a disk for a while, either.
    spool_max_size = 2**40


async def read_pictures(
    request: Request, field: str, most: int, max_bytes: int, seconds: float
) -> list[tuple[str, bytes]]:
    """(name, bytes) of each file in the form's `field`, at most `most` of `max_bytes` each.

    Raises `Refusal`: 400 for a broken form, 408 for one that takes longer than `seconds`, 413 for
    too many bytes, files or fields, 415 for what is no form, 422 where no file is in the field.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "multipart/form-data":
        raise Refusal(
            415, "NO_FORM", f"send a form (multipart/form-data) with the picture as {field!r}"
        )
    limit = most * max_bytes + _OVERHEAD
    parser = _Parser(
        request.headers,
        _limited(request, limit),
        max_files=most,
        max_fields=_MOST_FIELDS,
        max_part_size=_MOST_FIELD_BYTES,
    )
    try:
        async with asyncio.timeout(seconds):
            form = await parser.parse()
    except TimeoutError:
        raise Refusal(
            408,
            "TOO_SLOW",
            f"the request did not arrive within {seconds:g} s: send it faster",
            {"Connection": "close"},
        ) from None
    except MultiPartException as error:
        too_many = error.message.startswith(("Too many", "Part exceeded"))
        raise Refusal(
            413 if too_many else 400, "TOO_MANY_PARTS" if too_many else "BAD_FORM", error.message
        ) from None
    except FormParserError as error:
        raise Refusal(400, "BAD_FORM", f"the form is broken: {error}") from None
    except ClientDisconnect:
        raise Refusal(400, "GONE", "the client went away before its request was complete") from None
    files = [item for item in form.getlist(field) if isinstance(item, UploadFile) and item.filename]
    try:
        pictures = [(file.filename or "", await _bytes(file, max_bytes)) for file in files]
    finally:
        await form.close()
    if not pictures:
        raise Refusal(
            422, "NO_FILE", f"the form has no file named {field!r}: send the picture under it"
        )
    return pictures


def announced_pictures(request: Request, most: int, max_bytes: int) -> int:
    """How many of the largest pictures have as many bytes as a request says that it has."""
    length = request.headers.get("content-length")
    # Without a word it may be anything.
    return most if length is None else min(most, max(1, ceil(int(length) / max_bytes)))


async def _bytes(file: UploadFile, max_bytes: int) -> bytes:
    if (file.size or 0) > max_bytes:
        raise too_large(max_bytes)
    return await file.read()


def too_large(limit: int) -> Refusal:
    # What is still on its way would be read to its end otherwise.
    return Refusal(
        413,
        "TOO_LARGE",
        f"more than {limit:,} bytes: send a smaller picture",
        {"Connection": "close"},
    )


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces, no more than `limit` bytes in all."""
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large(limit)
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limit:
            raise too_large(limit)
        yield piece
