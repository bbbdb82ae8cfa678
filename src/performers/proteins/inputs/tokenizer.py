"""The protein tokenizer: one token a residue, as an ordinary transformers fast tokenizer.

The vocabulary, 31 tokens: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, ``<unk>`` 3, ``<mask>`` 4, the 20
amino acids ``ACDEFGHIKLMNPQRSTVWY`` 5-24, and ``XBZUOJ`` 25-30. Lower case reads as upper case,
white space is ignored, and any other character becomes one ``<unk>``.

Training rows, evaluations and embeddings read whole sequences, ``<bos> ... <eos>``, which
`encode_sequences` frames for every model. A call of the tokenizer gives a masked model the same,
and a causal model a prompt, ``<bos> ...``, from which generation continues.

Everything is in the saved ``tokenizer.json`` and ``tokenizer_config.json``: a saved tokenizer loads
with ``AutoTokenizer.from_pretrained`` where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 standard amino acids, in the order of their token ids."""

AMBIGUOUS = "XBZUOJ"
"""Unknown, Asx, Glx, selenocysteine, pyrrolysine and Xle, in the order of their token ids."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")
"""The special tokens, in the order of their token ids, from 0."""

# Bounds what one encode_batch call holds: an encoding costs some hundred bytes a residue.
_LETTERS_PER_CALL = 1_000_000


def build_protein_tokenizer(
    model_max_length: int | None = None, *, closed: bool = False
) -> PreTrainedTokenizerFast:
    """Build the protein tokenizer.

    Args:
        model_max_length: Longest input in tokens, ``<bos>`` and ``<eos>`` included, at least 3.
        closed: A call encodes whole proteins, ``<bos> ... <eos>`` with padding on the right, as
            masked models read them. Otherwise it encodes prompts, ``<bos> ...`` with padding on
            the left, which causal models continue.
    """
    if model_max_length is not None and model_max_length < 3:
        raise ValueError(
            f"model_max_length: expected at least 3 (<bos>, a residue, <eos>), got "
            f"{model_max_length}; give a larger length"
        )
    vocabulary = [*SPECIAL_TOKENS, *AMINO_ACIDS, *AMBIGUOUS]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s+"), ""),
            # Letter by letter, because Unicode's upper case turns some foreign letters into ASCII
            # ones ('ß' into 'SS'), which would then pass for residues.
            *(normalizers.Replace(letter, letter.upper()) for letter in ascii_lowercase),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if closed else "<bos> $A",
        pair="<bos> $A <eos> $B:1 <eos>:1" if closed else "<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
    )
    backend.decoder = decoders.Fuse()
    options = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="right" if closed else "left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def encode_sequences(
    tokenizer: PreTrainedTokenizerFast, sequences: Sequence[str]
) -> list[npt.NDArray[np.int16]]:
    """Encode whole sequences as ``<bos> ... <eos>``, without padding or truncation.

    The begin and end tokens are added here, whatever a call of the tokenizer adds: a causal model's
    leaves a prompt open.

    Returns:
        One int16 array a sequence, of shape (number of its tokens,).

    Raises:
        ValueError: The tokenizer has no begin or end token.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or end is None:
        raise ValueError(
            "tokenizer: expected a bos_token and an eos_token to frame sequences with; set them or "
            "give a tokenizer from build_protein_tokenizer"
        )
    backend = tokenizer.backend_tokenizer
    # The backend keeps the settings of the last call of the tokenizer.
    backend.no_padding()
    backend.no_truncation()
    return [
        np.array([begin, *encoding.ids, end], dtype=np.int16)
        for chunk in _chunks(sequences)
        for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False)
    ]


def residue_ids(
    tokenizer: PreTrainedTokenizerBase, letters: str = AMINO_ACIDS + AMBIGUOUS
) -> npt.NDArray[np.int64]:
    """Look up the token ids of residue letters, (letters,).

    Raises:
        ValueError: The vocabulary lacks a letter.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [letter for letter in letters if letter not in vocabulary]:
        raise ValueError(
            f"tokenizer: expected one token for each residue, {', '.join(missing)} not found; "
            "give a protein tokenizer such as build_protein_tokenizer()"
        )
    return np.array([vocabulary[letter] for letter in letters], dtype=np.int64)


def _chunks(sequences: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    letters = 0
    for sequence in sequences:
        chunk.append(sequence)
        letters += len(sequence)
        if letters >= _LETTERS_PER_CALL:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk
