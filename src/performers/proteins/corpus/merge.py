"""From the blocks of all parts to a corpus: clusters held out, splits, token files, manifest."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.app.errors import UserError
from performers.app.files import read_json
from performers.app.progress import Progress
from performers.app.provenance import KEY, write_result
from performers.proteins.corpus.blocks import Block, open_parts, record_settings
from performers.proteins.corpus.mmseqs import Mmseqs
from performers.proteins.corpus.relatives import RelativesSearch
from performers.proteins.corpus.shards import FORMAT, VOCABULARY, ShardWriter
from performers.proteins.corpus.splitting import (
    SPLITS,
    Draws,
    candidate_clusters,
    draws,
    independent_clusters,
    split_bounds,
    split_codes,
    whole_groups,
)
from performers.proteins.inputs.fasta import open_fasta, write_fasta

Report = Callable[[str], None]

# Only clusters without relatives in the rest are held out; many have some.
_CANDIDATES_PER_HELD_OUT = 6
# Clusters of this size are candidates even if they exceed a tenth of the sequences held out.
_ALWAYS_SMALL = 10
# Draws in memory at once where all are counted.
_COUNTED_AT_ONCE = 1 << 22


def finished(output: Path, wanted: Mapping[str, Any], report: Report) -> dict[str, Any] | None:
    """The manifest of a corpus that is complete; None where it is still to be made.

    Raises:
        UserError: The folder holds a corpus or a run of another kind.
    """
    manifest_file, work = output / "manifest.json", output / "work"
    if manifest_file.exists():
        manifest = read_json(manifest_file)
        if {key: manifest.get(key) for key in wanted} == wanted:
            # Left by a run that was stopped between writing the manifest and this.
            shutil.rmtree(work, ignore_errors=True)
            report("the corpus is there already")
            return {key: value for key, value in manifest.items() if key != KEY}
        raise UserError(f"{output} holds another corpus; give another --output")
    work.mkdir(parents=True, exist_ok=True)
    record_settings(work / "settings.json", wanted, f"{output} holds a run")
    return None


def merge_parts(
    parts: Sequence[Path],
    output: Path,
    *,
    threads: int = 2,
    memory: int = 1500 << 20,
    read: Mapping[str, int] | None = None,
    report: Report = lambda text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a corpus from all parts of its input: token shards of four splits, a manifest.

    The order of the parts does not matter: the corpus is that of the input read in one part, byte
    for byte. Searches are kept in ``output/work``, so that a run that was stopped goes on from
    there; the manifest is written last and the work folder removed.

    1. Out of distribution: clusters drawn with the seed, of which no member has a hit in what is
       not held out (mmseqs2 search, repeated until it finds none); clusters that are related to
       each other are held out together.
    2. Validation and test from what is left, by the draws of the blocks; the rest is for training.

    Args:
        parts: Folders that `write_part` wrote.
        output: The folder; made if missing.
        threads: Threads of mmseqs2.
        memory: Bytes for its index.
        read: Counts of what was read, for the manifest; by default those of the blocks.
        report: Called with a line as each stage begins.
        progress: Called with blocks written and blocks in all.

    Returns:
        The manifest.

    Raises:
        UserError: The parts are not those of one input, a split would be empty, mmseqs2 is not
            there or fails, or the folder holds a corpus or a run of another kind.
    """
    settings, paths = open_parts(parts)
    done = finished(output, settings, report)
    if done is not None:
        return done
    options, work = settings["options"], output / "work"
    mmseqs = Mmseqs(work, threads, memory)
    corpus = _Blocks(paths)
    counts = dict(read) if read is not None else corpus.counts()
    total = corpus.sequences
    if not total:
        raise UserError("the source holds no protein sequence of the length asked for")
    clusters = corpus.distinct(lambda block: np.zeros(block.lengths.size, dtype=np.int8))[0]
    target = max(1, round(options["ood_fraction"] * total))
    candidates, members = corpus.candidates(options, target)
    search = RelativesSearch(mmseqs, corpus.fresh, members, clusters, options, report)
    independent = independent_clusters(candidates, search)
    held_out = draws(
        whole_groups(independent, search.among(independent), members, target),
        options["seed"],
        "clusters",
    )
    bounds = corpus.bounds(options, held_out)
    report("writing token files")
    entries = _write_splits(corpus, output, options, bounds, held_out, progress)
    manifest = {
        "format": FORMAT,
        **settings,
        "read": counts,
        "mmseqs_version": mmseqs.version,
        "clusters": clusters,
        "ood_candidates": len(candidates),
        "ood_searches": search.record,
        "vocabulary": list(VOCABULARY),
        "splits": entries,
    }
    write_result(output / "manifest.json", manifest, "corpus", seed=options["seed"])
    shutil.rmtree(work)
    return manifest


class _Blocks:
    """All blocks, in passes over them that hold one at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.sequences = sum(block.lengths.size for block in self.fresh())

    def __len__(self) -> int:
        return len(self._paths)

    def fresh(self) -> Iterator[Block]:
        """Yield the blocks with nothing read yet."""
        return (Block(path) for path in self._paths)

    def counts(self) -> dict[str, int]:
        """Counts of what was read, added up."""
        sums = Counter[str]()
        for block in self.fresh():
            sums.update(block.counts())
        return dict(sums)

    def candidates(
        self, options: Mapping[str, Any], target: int
    ) -> tuple[list[str], dict[str, list[str]]]:
        """Clusters that may be held out, and the members of each."""
        sequences = min(_CANDIDATES_PER_HELD_OUT * target, self.sequences // 2)
        largest = max(target // 10, min(target, _ALWAYS_SMALL))
        for share in _doubled(2 * sequences / self.sequences):
            members: dict[str, list[str]] = defaultdict(list)
            for block in self.fresh():
                for i in np.flatnonzero(_below(block.cluster_draws, share)).tolist():
                    members[block.clusters[i]].append(block.names[i])
            names = candidate_clusters(members, options["seed"], sequences, largest)
            if sum(len(members[name]) for name in names) >= sequences:
                break
        return names, {name: members[name] for name in names}

    def bounds(self, options: Mapping[str, Any], held_out: Draws) -> tuple[int, int]:
        """Bounds of the splits that are drawn."""
        validation, test = (
            round(options[f"{split}_fraction"] * self.sequences) for split in ("validation", "test")
        )
        for share in _doubled(2 * max(1, validation + test) / self.sequences):
            smallest = []
            for block in self.fresh():
                mask = _below(block.split_draws, share) & ~np.isin(block.cluster_draws, held_out)
                smallest.append(block.split_draws[mask])
            together = np.concatenate(smallest)
            if together.size > validation + test:
                break
        return split_bounds(together, validation, test)

    def distinct(self, code: Callable[[Block], npt.NDArray[np.int8]]) -> dict[int, int]:
        """Number of clusters among the sequences of each code.

        In as many passes as keep the draws in memory few.
        """
        passes = -(-self.sequences // _COUNTED_AT_ONCE)
        sums: dict[int, int] = defaultdict(int)
        for number in range(passes):
            found: dict[int, list[Draws]] = defaultdict(list)
            for block in self.fresh():
                here = block.cluster_draws % np.uint64(passes) == number
                codes = code(block)
                for one in np.unique(codes[here]).tolist():
                    found[one].append(_distinct(block.cluster_draws[here & (codes == one)]))
            for one in list(found):
                sums[one] += _distinct(np.concatenate(found.pop(one))).size
        return sums


def _doubled(share: float) -> Iterator[float]:
    """Yield a share, doubled again and again, up to 1."""
    while share < 1:
        yield share
        share *= 2
    yield 1.0


def _distinct(draws: Draws) -> Draws:
    """Different ones of a copy of some draws, by sorting: numpy's table takes far more memory."""
    draws.sort()
    return draws[np.diff(draws, prepend=~draws[:1]) != 0]


def _below(draws: Draws, share: float) -> npt.NDArray[np.bool_]:
    """Mask of the draws in the first share of all numbers."""
    if share == 1:
        return np.ones(draws.size, dtype=bool)
    return np.asarray(draws < np.uint64(int(share * 2**64)))


def _write_splits(
    corpus: _Blocks,
    output: Path,
    options: Mapping[str, Any],
    bounds: tuple[int, int],
    held_out: Draws,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Write the shards of all splits, and FASTA of the small ones; return their entries."""

    def codes(block: Block) -> npt.NDArray[np.int8]:
        return split_codes(block.split_draws, np.isin(block.cluster_draws, held_out), bounds)

    clusters = corpus.distinct(codes)
    empty = [split for code, split in enumerate(SPLITS) if not clusters.get(code)]
    if empty:
        raise UserError(
            f"of {corpus.sequences} sequences none is left for {', '.join(empty)}; raise "
            "--validation-fraction, --test-fraction or --ood-fraction, or give more sequences"
        )
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    writers = [ShardWriter(output / split, options["shard_tokens"]) for split in SPLITS]
    with ExitStack() as stack:
        files = {
            code: stack.enter_context(open_fasta(output / f"{split}.fasta.gz"))
            for code, split in enumerate(SPLITS)
            if split != "train"
        }
        for number, block in enumerate(corpus.fresh(), start=1):
            of = codes(block)
            for code, writer in enumerate(writers):
                mask = of == code
                if mask.any():
                    writer.extend(*block.chosen(mask))
                    if code in files:
                        write_fasta(files[code], block.records(mask, described=True))
            if progress is not None:
                progress(number, len(corpus))
    return {
        split: {**writer.close(), "clusters": clusters[code]}
        for code, (split, writer) in enumerate(zip(SPLITS, writers, strict=True))
    }
