"""What a client wants to have, by its Accept header (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence


def preferred(accept: str, offers: Sequence[str]) -> str:
    """The offered media type that is wanted most; the first of them where it is all the same."""
    ranges = [_quality(part) for part in accept.split(",") if part.strip()]
    if not ranges:
        return offers[0]

    def wanted(offer: str) -> float:
        kind = offer.partition("/")[0]
        # The most specific range that fits counts.
        for name in (offer, f"{kind}/*", "*/*"):
            found = [quality for given, quality in ranges if given == name]
            if found:
                return max(found)
        return 0.0

    return max(offers, key=wanted)


def _quality(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, float(parameter[2:])
            except ValueError:
                return name, 0.0
    return name, 1.0
