"""Writes BLAST databases of version 4, by the format's description."""

import struct

ALPHABET = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"


def _ber_length(size):
    if size < 128:
        return bytes([size])
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(digits)]) + digits


def write_blast(prefix, records):
    """Write ``prefix`` .pin, .phr and .psq with (title, sequence) records."""
    headers, residues = b"", b"\0"
    header_at, sequence_at = [0], [1]
    for title, sequence in records:
        data = title.encode()
        headers += bytes.fromhex("30803080a0801a") + _ber_length(len(data)) + data + b"\0" * 8
        residues += bytes(ALPHABET.index(letter) for letter in sequence) + b"\0"
        header_at.append(len(headers))
        sequence_at.append(len(residues))
    index = struct.pack(">II", 4, 1)
    for text in (b"a title", b"2014-01-01"):
        index += struct.pack(">I", len(text)) + text
    total = sum(len(sequence) for _, sequence in records)
    longest = max(len(sequence) for _, sequence in records)
    index += struct.pack(">I", len(records)) + struct.pack("<Q", total) + struct.pack(">I", longest)
    index += struct.pack(f">{len(header_at)}I", *header_at)
    index += struct.pack(f">{len(sequence_at)}I", *sequence_at)
    for end, content in ((".pin", index), (".phr", headers), (".psq", residues)):
        prefix.with_name(prefix.name + end).write_bytes(content)
