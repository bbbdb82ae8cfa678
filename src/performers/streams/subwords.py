"""Tokenizers of texts, and texts as subwords that are written once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from performers.app.errors import UserError, bare_exceptions
from performers.app.files import replacement, write_json
from performers.streams.text import Document, LeftOut, Texts, listed, report_left_out, usable_bytes

BYTES = 256
"""Size of the vocabulary of bytes."""

_PIECE = 1 << 20


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose 256 tokens are the bytes, numbered by their values."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[x]: x for x in range(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for a `byte_tokenizer`, also one that was saved."""
    letters = bytes_to_unicode()
    return tokenizer.get_vocab() == {letters[value]: value for value in range(BYTES)}


def load_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Load a tokenizer of subwords from a ``tokenizer.json`` or the folder of a model.

    Raises:
        UserError: There is no tokenizer, it cannot be read, or its tokens have numbers beyond their
            count.
    """
    if not path.exists():
        raise UserError(f"--tokenizer {path} does not exist; give a tokenizer.json or its folder")
    try:
        with bare_exceptions("tokenizer.json"):
            if path.is_dir():
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            else:
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tokenizer {path} cannot be read ({reason}); give a tokenizer.json or its folder"
        ) from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest != len(tokenizer) - 1:
        raise UserError(
            f"--tokenizer {path} numbers its {len(tokenizer)} tokens up to {highest}; give one "
            "that numbers them from 0 without gaps"
        )
    tokenizer.model_max_length = max_length
    return tokenizer


def write_subwords(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    report: Callable[[str], None],
) -> Texts:
    """Texts as subwords, which are written to a folder once and read from it from then on.

    A text is encoded in pieces of about 1 MB that end with a line. Texts that the tokenizer does
    not give back are counted and reported, since their tokens hold less than their bytes. The
    folder receives ``tokens.bin`` and ``tokens.json``; files that are left out are reported too.

    Raises:
        UserError: No file can be used.
    """
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    # Everything that tokens depend on, as far as the tokenizer tells.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if isinstance(backend, Tokenizer) else repr(tokenizer.get_vocab())
    source = hashlib.sha256(rules.encode())
    for file in files:
        status = file.stat() if file.exists() else None
        seen = status and (status.st_size, status.st_mtime_ns)
        source.update(f"{file}\0{seen}\n".encode())
    data, index = folder / "tokens.bin", folder / "tokens.json"
    if data.exists() and index.exists():
        known = json.loads(index.read_text(encoding="utf-8"))
        if known["source"] == source.hexdigest() and data.stat().st_size == known["size"]:
            for line in known["lines"]:
                report(line)
            found = [Document(data, *entry) for entry in known["documents"]]
            return Texts(tuple(found), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    left_out: LeftOut = {}
    documents, lines, changed, place = list[Document](), list[str](), list[str](), 0
    with replacement(data) as temporary, temporary.open("wb") as out:
        for file in files:
            size = usable_bytes(file, left_out)
            if not size:
                continue
            begun, read, given_back = place, 0, True
            try:
                for block in _pieces(file):
                    piece = block.decode("utf-8")
                    ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                    out.write(np.asarray(ids, dtype=dtype).tobytes())
                    place += len(ids)
                    given_back = given_back and _is_given_back(tokenizer, piece, ids)
                    read += len(block)
            except UnicodeDecodeError as error:
                out.seek(begun * np.dtype(dtype).itemsize)
                out.truncate()
                place = begun
                where = f"{file.name} at byte {read + error.start:,}"
                left_out.setdefault("not UTF-8 text", []).append(where)
                continue
            if place - begun < 2:
                left_out.setdefault("of fewer than two tokens", []).append(file.name)
                continue
            documents.append(Document(data, begun, place, size))
            if not given_back:
                changed.append(file.name)
        report_left_out(left_out, documents, len(files), lines.append)
    if changed:
        lines.append(
            f"the tokenizer does not give back {len(changed)} of {len(documents)} texts (it drops "
            f"or changes letters): {listed(changed)}; their bits per byte are too low to compare"
        )
    entries = [(document.start, document.stop, document.size) for document in documents]
    write_json(
        index,
        {
            "source": source.hexdigest(),
            "size": data.stat().st_size,
            "lines": lines,
            "documents": entries,
        },
    )
    for line in lines:
        report(line)
    return Texts(tuple(documents), dtype)


def _pieces(file: Path) -> Iterator[bytes]:
    """Content of a file in pieces of about 1 MB that end with a line, or else before a space."""
    rest = b""
    with file.open("rb") as source:
        while block := source.read(_PIECE):
            rest += block
            if len(block) < _PIECE:
                break
            cut = rest.rfind(b"\n") + 1 or max(rest.rfind(b" "), 0)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def _is_given_back(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> bool:
    """False where tokens hold less than the text; not all of it is seen without a decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        unknown = getattr(backend.model, "unk_token", None)
        if unknown is not None and backend.token_to_id(unknown) in ids:
            return False
        if backend.decoder is None:
            return True
    decoded: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # Some tokenizers begin any text with a space, and leave it out again.
    return decoded.strip() == text.strip()
