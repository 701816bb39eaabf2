"""The Hub's other storage, for its stand-in: what hf_xet sends and fetches, chunks of files gathered in xorbs.

As https://huggingface.co/docs/xet has it, without compression: HF_XET_XORB_COMPRESSION_POLICY=none must be set, which the
library reads when it first transfers in a process.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from dataclasses import dataclass, field

TOKEN = "xet_short_lived"
BOOKEND = b"\xff" * 32
ENTRY = 48  # bytes of everything in a shard
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30


@dataclass
class Term:
    xorb: str
    first: int
    last: int  # the chunk after
    size: int


@dataclass
class Xet:
    """Xorbs as they came, by their hash, and each file's terms, by its own; `known` maps a sha256 to that."""

    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)


def chunks(xorb: bytes) -> list[tuple[int, bytes]]:
    """Each chunk's place and content: after 8 bytes of header, version, stored size, compression and size."""
    found, place = [], 0
    while place < len(xorb):
        version, stored, compression, size = (
            xorb[place],
            int.from_bytes(xorb[place + 1 : place + 4], "little"),
            xorb[place + 4],
            int.from_bytes(xorb[place + 5 : place + 8], "little"),
        )
        assert (version, compression, stored) == (0, 0, size)
        found.append((place, xorb[place + 8 : place + 8 + size]))
        place += 8 + size
    return found


def hexadecimal(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> dict[str, list[Term]]:
    """The files that a shard tells of."""
    files, place = {}, ENTRY  # after its header
    while shard[place : place + 32] != BOOKEND:
        name, (flags, count) = hexadecimal(shard[place : place + 32]), struct.unpack_from("<II", shard, place + 32)
        place += ENTRY
        files[name] = []
        for _ in range(count):
            size, first, last = struct.unpack_from("<III", shard, place + 36)
            files[name].append(Term(hexadecimal(shard[place : place + 32]), first, last, size))
            place += ENTRY
        place += ENTRY * (count * bool(flags & VERIFIED) + bool(flags & WITH_SHA256))
    return files


# ---- what the stand-in's handler does


def give_token(handler, repo, kind, revision):
    if handler.repository(repo, write=kind == "write"):
        address, until = f"{handler.server.address}/cas", int(time.time()) + 600
        about = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(until)}
        handler.answer(200, {"accessToken": TOKEN, "exp": until, "casUrl": address}, **about)


def take_xorb(handler, name):
    data = handler.body()
    handler.server.received += len(data)
    handler.server.xet.xorbs[name] = data
    handler.answer(200, {"was_inserted": True})


def take_shard(handler):
    xet = handler.server.xet
    for name, terms in shard_files(handler.body()).items():
        content = b"".join(data for t in terms for _, data in chunks(xet.xorbs[t.xorb])[t.first : t.last])
        assert len(content) == sum(term.size for term in terms)
        sha256 = hashlib.sha256(content).hexdigest()
        handler.server.large[sha256], xet.files[name], xet.known[sha256] = content, terms, name
    handler.answer(200, {"result": 1})


def reconstruct(handler, name):
    xet, terms, places = handler.server.xet, [], {}
    for term in xet.files[name]:
        spans = [place for place, _ in chunks(xet.xorbs[term.xorb])] + [len(xet.xorbs[term.xorb])]
        chosen = {"start": term.first, "end": term.last}
        terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": chosen})
        places.setdefault(term.xorb, []).append(
            {
                "range": chosen,
                "url": f"{handler.server.address}/xorbs/{term.xorb}",
                "url_range": {"start": spans[term.first], "end": spans[term.last] - 1},
            }
        )
    handler.answer(200, {"offset_into_first_range": 0, "terms": terms, "fetch_info": places})


def give_xorb(handler, name):
    data = handler.server.xet.xorbs[name]
    first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())
    part = data[first : last + 1]
    handler.server.sent += len(part)
    handler.answer(206, part, Content_Range=f"bytes {first}-{last}/{len(data)}")


def refuse(handler):
    """What the library asks for first and does without: deduplication, later versions of what is above, telemetry."""
    handler.body()
    handler.answer(404)


ROUTES = [
    (r"GET /api/models/(?P<repo>[\w.-]+/[\w.-]+)/xet-(?P<kind>\w+)-token/(?P<revision>.+)", give_token),
    (r"POST /cas/v1/xorbs/default/(?P<name>\w+)", take_xorb),
    (r"POST /cas/v1/shards", take_shard),
    (r"GET /cas/v1/reconstructions/(?P<name>\w+)", reconstruct),
    (r"GET /xorbs/(?P<name>\w+)", give_xorb),
    (r"(?:GET|POST) /(?:cas/)?v\d/.*", refuse),
]
