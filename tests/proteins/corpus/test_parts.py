"""Corpora of UniRef50 and TrEMBL, read as a stream, whole and in parts."""

import gzip
import itertools
import json
import lzma
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.corpus import (
    Part,
    SplitOptions,
    merge_parts,
    prepare_clustered,
    prepare_part,
)
from performers.proteins.corpus.blocks import Block, open_parts
from performers.proteins.corpus.sources import given_source
from performers.proteins.inputs import fasta as fasta_module
from tests.proteins.corpus import stand_in
from tests.proteins.corpus.test_prepare import LETTERS, check_splits, family_records

OPTIONS = SplitOptions(
    validation_fraction=0.1, test_fraction=0.1, ood_fraction=0.1, shard_tokens=500, seed=3
)


@pytest.fixture(autouse=True)
def small_blocks_and_mmseqs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(stand_in.install(tmp_path / "bin")), prepend=":")
    blocks = fasta_module.iter_fasta_blocks

    def small(*arguments, **options):
        return blocks(*arguments, block=700, **options)

    monkeypatch.setattr("performers.proteins.corpus.blocks.iter_fasta_blocks", small)


def uniref_records():
    """300 clusters of one sequence; the first hundred are relatives in pairs (last four)."""
    heads = ["".join(h) for h in itertools.islice(itertools.product(LETTERS, repeat=4), 300)]
    middles = [sequence[4:14] for _, sequence in family_records()]
    return [
        (f"UniRef50_P{i:03d}", heads[i] + middles[i] + heads[i // 2 if i < 100 else i])
        for i in range(300)
    ]


def uniref(tmp_path):
    path = tmp_path / "uniref50.fasta"
    path.write_text(
        "".join(
            f">{name} protein n=1 Tax=X TaxID=1 RepID=X_Y\n{s[:7]}\n{s[7:]}\n"
            for name, s in uniref_records()
        )
    )
    return path


def trembl(tmp_path):
    """The same under the headers of TrEMBL, and a table of their families."""
    path, table = tmp_path / "trembl.fasta", tmp_path / "clusters.tsv"
    records = family_records()
    path.write_text("".join(f">tr|{name}|{name}_X words\n{s}\n" for name, s in records))
    table.write_text("".join(f"UniRef50_{s[:4]}\t{name}\n" for name, s in records[::-1]))
    return path, table


def files_of(folder):
    """Content of every file; of the manifest without what differs between two runs."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = json.loads(found["manifest.json"])
    manifest.pop("provenance")
    return {**found, "manifest.json": json.dumps(manifest)}


def make_parts(source, folder, of=4, clusters=None, options=OPTIONS):
    folders = [folder / f"part{i}" for i in range(1, of + 1)]
    for number, one in enumerate(folders, start=1):
        prepare_part(source, one, options, Part(number, of), clusters=clusters)
    return folders


def contents(parts):
    """Every protein of the parts in order, its cluster and its draws."""
    found = []
    for block in map(Block, open_parts(parts)[1]):
        records = block.records(np.ones(block.lengths.size, dtype=bool))
        rows = (records, block.clusters, block.cluster_draws.tolist(), block.split_draws.tolist())
        found += list(zip(*rows, strict=True))
    return found


@pytest.mark.parametrize("kind", ["uniref50", "trembl"])
def test_parts_merged_are_the_whole_whose_splits_are_those_of_hashes(tmp_path, kind):
    path, table = (uniref(tmp_path), None) if kind == "uniref50" else trembl(tmp_path)
    source = given_source([path])
    whole = prepare_clustered(source, tmp_path / "whole", OPTIONS, clusters=table)
    parts = make_parts(source, tmp_path, clusters=table)
    assert all(len(list(part.glob("*.npz"))) > 2 for part in parts)
    merged = merge_parts([parts[i] for i in (2, 0, 3, 1)], tmp_path / "merged")
    assert merged == whole
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    assert sum(entry["sequences"] for entry in merged["splits"].values()) == 300
    assert merged["read"] == {"records": 300, "left_out": 0, "residues": 300 * 18}
    records = uniref_records() if kind == "uniref50" else family_records()
    cluster = {n: n if kind == "uniref50" else f"UniRef50_{s[:4]}" for n, s in records}
    check_splits(tmp_path / "whole", whole, dict(records), cluster, cluster)


def test_shares_of_few_sequences_that_are_none(tmp_path):
    """Shares that round to no sequence are refused."""
    path = uniref(tmp_path)
    path.write_text(">".join(path.read_text().split(">")[:41]))
    with pytest.raises(UserError, match="of 40 sequences none is left for validation, test"):
        prepare_clustered(given_source([path]), tmp_path / "c", SplitOptions())


def test_compressed_input_and_several_files(tmp_path):
    path = uniref(tmp_path)
    text = path.read_bytes()
    cut = text.index(b">", len(text) // 2)
    files = [tmp_path / "a.fasta", tmp_path / "b"]
    files[0].write_bytes(text[:cut].replace(b"\n", b"\r\n"))
    files[1].write_bytes(lzma.compress(text[cut:]))
    parts = make_parts(given_source(files), tmp_path, of=3)
    (whole,) = make_parts(given_source([path]), tmp_path / "whole", of=1)
    assert contents(parts) == contents([whole])


def test_a_part_that_was_stopped_goes_on(tmp_path, monkeypatch):
    source = given_source([uniref(tmp_path)])
    prepare_part(source, tmp_path / "whole", OPTIONS, Part(1, 1))
    from performers.proteins.corpus import blocks as module

    write, written = module._write_block, []

    def stops(path, *arguments):
        if len(written) == 5:
            raise KeyboardInterrupt
        write(path, *arguments)
        written.append(path.name)

    monkeypatch.setattr(module, "_write_block", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(source, tmp_path / "part", OPTIONS, Part(1, 1))
    with pytest.raises(UserError, match="part is not finished; run its command again"):
        merge_parts([tmp_path / "part"], tmp_path / "out")
    written.clear()
    monkeypatch.setattr(
        module, "_write_block", lambda p, *a: written.append(p.name) or write(p, *a)
    )
    prepare_part(source, tmp_path / "part", OPTIONS, Part(1, 1))
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.npz"))
    assert written == names[5:]
    assert sorted(path.name for path in (tmp_path / "part").glob("*.npz")) == names
    # A finished part is mended as its errors say.
    (tmp_path / "part" / names[2]).unlink()
    (tmp_path / "part" / names[4]).write_bytes(b"PK")
    written.clear()
    prepare_part(source, tmp_path / "part", OPTIONS, Part(1, 1))
    assert written == [names[2], names[4]]
    assert contents([tmp_path / "part"]) == contents([tmp_path / "whole"])


def test_blocks_of_a_file_are_its_records(tmp_path):
    path = tmp_path / "odd.fasta"
    records = [(f"P{i}", "MKV" * (i * 7 % 23 + 1)) for i in range(60)]
    text = "\ufeff" + "".join(
        f">{name} a > b é\r\n{s[:10]}{chr(13) if i % 2 else chr(10)}{s[10:]}\n\n"
        for i, (name, s) in enumerate(records)
    )
    path.write_bytes(text.encode())
    expected = [record.header + record.sequence for record in fasta_module.iter_fasta(path)]

    def read(block, wanted=lambda _: True):
        blocks = fasta_module.iter_fasta_blocks(path, wanted, block=block)
        return {number: records for number, records, _ in blocks}

    for block in (1, 2, 16, 17, 64, 1000, 10**6):
        found = read(block)
        assert [r.header + r.sequence for rs in found.values() for r in rs] == expected
        for of in (2, 3):
            some = {}
            for part in (Part(k, of) for k in range(1, of + 1)):
                some.update(read(block, partial(part.has, 0)))
            assert some == found
    # Faults are told by their line in the file, in whatever block.
    damaged = text.replace(">P50 a > b é\r\nMKV", ">P50 a > b é\r\nMK1")
    for content in (damaged.encode(), b"", b"\n", b"MKV\n"):
        path.write_bytes(content)
        with pytest.raises(UserError) as whole:
            list(fasta_module.iter_fasta(path))
        for block in (1, 16, 100):
            with pytest.raises(UserError) as one:
                read(block)
            assert str(one.value) == str(whole.value)


def test_idmapping_tables(tmp_path):
    path, table = trembl(tmp_path)
    two = make_parts(given_source([path]), tmp_path / "two", of=1, clusters=table)
    assert [cluster for _, cluster, *_ in contents(two)] == [
        f"UniRef50_{sequence[:4]}" for _, sequence in family_records()
    ]
    pairs = [line.split("\t") for line in table.read_text().splitlines()]
    selected = tmp_path / "idmapping_selected.tab.gz"
    lines = [
        "\t".join([name, f"{name}_X", *[""] * 5, "UniRef100_Z", "UniRef90_Z", cluster, *[""] * 12])
        for cluster, name in pairs
    ]
    lines.append("\t".join(["NONE", *[""] * 21]))
    selected.write_bytes(gzip.compress("\n".join(lines).encode()))
    long = tmp_path / "idmapping.dat"
    long.write_text(
        "".join(
            f"{n}\tGeneID\t12\n{n}\tUniRef90\tUniRef90_Z\n{n}\tUniRef50\t{c}\n" for c, n in pairs
        )
    )
    for number, other in enumerate((selected, long)):
        made = make_parts(given_source([path]), tmp_path / str(number), of=2, clusters=other)
        assert contents(made) == contents(two)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(selected.read_bytes()[:-20])
    rotten = tmp_path / "rotten.gz"
    # The checksum.
    rotten.write_bytes(selected.read_bytes()[:-8] + bytes(8))
    for bad, text, message in (
        (None, "A\tS000\nB\tS001\n", "bad.tsv names no cluster for S002; give the table"),
        (None, table.read_text() + "UniRef50_Q\tS000\n", "lists a member of .* twice"),
        (None, "A\tB\nA\n", "bad.tsv:2: expected two columns"),
        (None, "A B C\n", "bad.tsv:1: expected two columns"),
        (None, "A\tB\nCluster 1\tC\n", "bad.tsv:2: the cluster 'Cluster 1' has more than one"),
        (None, "", "names no cluster of a protein"),
        (cut, "", "cut.gz is damaged .it ends too early.; copy"),
        (rotten, "", "rotten.gz is damaged .*; copy"),
    ):
        chosen = bad or tmp_path / "bad.tsv"
        if bad is None:
            chosen.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare_part(given_source([path]), tmp_path / "x", OPTIONS, Part(1, 1), clusters=chosen)
        shutil.rmtree(tmp_path / "x")


def test_headers_without_a_cluster_of_uniref50(tmp_path):
    path = tmp_path / "x.fasta"
    for header, message in (
        ("P12345", "x.fasta: the record P12345 names no cluster; expected UniRef50_"),
        ("UniRef50_", "names no cluster"),
        ("UniRef90_P1", "UniRef90_P1 is of UniRef90, whose"),
    ):
        path.write_text(f">UniRef50_A\nMKV\n>{header} words\nMKV\n")
        with pytest.raises(UserError, match=message):
            prepare_part(given_source([path]), tmp_path / "part", OPTIONS, Part(1, 1))
        shutil.rmtree(tmp_path / "part")


def test_parts_that_do_not_go_together(tmp_path):
    path = uniref(tmp_path)
    source = given_source([path])
    parts = make_parts(source, tmp_path, of=2)
    other = SplitOptions(**{**OPTIONS.__dict__, "seed": 4})
    prepare_part(source, tmp_path / "seed", other, Part(2, 2))
    prepare_part(source, tmp_path / "three", OPTIONS, Part(2, 3))
    (tmp_path / "more.fasta").write_text(path.read_text() + ">UniRef50_MORE\nMKV\n")
    prepare_part(given_source([tmp_path / "more.fasta"]), tmp_path / "data", OPTIONS, Part(2, 2))
    shutil.copytree(parts[1], tmp_path / "copy")
    shutil.copytree(parts[1], tmp_path / "lost")
    next((tmp_path / "lost").glob("*.npz")).unlink()
    for given, message in (
        ([parts[0], tmp_path / "seed"], r"their seed differs \(3 and 4\)"),
        ([parts[0], tmp_path / "three"], r"their number of parts differs \(2 and 3\)"),
        ([parts[0], tmp_path / "data"], "different corpora: their source differs"),
        ([*parts, tmp_path / "copy"], "part2 and .*copy are both part 2 of 2; name each"),
        ([parts[1]], "of 2 parts 1/2 is missing"),
        ([parts[0], tmp_path / "lost"], "npz is missing or cut short"),
        ([parts[0], tmp_path], "is not a part of a corpus; name folders made with --part"),
        ([], "expected the folders of the parts"),
    ):
        with pytest.raises(UserError, match=message):
            merge_parts(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds a part with other options or data"):
        prepare_part(source, parts[0], OPTIONS, Part(2, 2))
    shutil.copy(tmp_path / "more.fasta", tmp_path / "copy.fasta")
    with pytest.raises(UserError, match=r"more\.fasta has the content of .*copy\.fasta; name it"):
        given_source([tmp_path / "copy.fasta", tmp_path / "more.fasta"])
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/4/2", ""):
        with pytest.raises(UserError, match="--part"):
            Part.read(text)
    assert Part.read("4/4") == Part(4, 4)


@pytest.mark.slow
def test_memory_is_constant(tmp_path):
    """The peaks of a part and of a merge do not grow with the number of proteins."""
    # A search that finds nothing: that of the stand-in takes hours.
    (tmp_path / "bin" / "mmseqs").write_text("#!/bin/sh\n[ $1 = version ] || : > hits.tsv\n")
    peaks = []
    for millions in (0.1, 0.5):
        path = tmp_path / "names.fasta"
        with path.open("w") as file:
            for i in range(int(millions * 1e6)):
                file.write(f">UniRef50_A{i:09d}\nMKVAWCDEFG\n")
        part, corpus = tmp_path / f"part{millions}", tmp_path / f"corpus{millions}"
        start = (
            "import resource, sys; from functools import partial; from pathlib import Path; "
            "from performers.proteins.corpus import *; "
            "from performers.proteins.corpus import blocks, merge; "
            "from performers.proteins.corpus.sources import given_source; "
            # So that the smaller one has several blocks, passes and files of tokens.
            "blocks.iter_fasta_blocks = partial(blocks.iter_fasta_blocks, block=1 << 20); "
            "merge._COUNTED_AT_ONCE = 1 << 15; "
            "first, second = map(Path, sys.argv[1:]); "
        )
        end = "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        options = "SplitOptions(shard_tokens=1 << 18)"
        prepare = f"prepare_part(given_source([first]), second, {options}, Part(1, 1))"
        for call, *paths in (
            (prepare, path, part),
            ("merge_parts([first], second)", part, corpus),
        ):
            program = [sys.executable, "-c", start + call + end, *paths]
            peaks.append(int(subprocess.check_output(program)))
    assert peaks[2] < 1.1 * peaks[0]
    assert peaks[3] < 1.1 * peaks[1]
