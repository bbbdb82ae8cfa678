"""``performers data swissprot`` from sequences to a corpus that trains."""

import gzip
import hashlib
import itertools

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.corpus import Corpus, CorpusOptions, prepare_corpus
from performers.proteins.corpus.sources import open_source
from performers.proteins.corpus.splitting import SPLITS
from tests.proteins.corpus import stand_in

OPTIONS = CorpusOptions(validation_fraction=0.1, test_fraction=0.1, ood_fraction=0.1)
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def family_records():
    """60 clusters of 5 (equal first four letters); pairs of clusters are relatives (last four)."""
    random = np.random.default_rng(0)
    heads = ["".join(h) for h in itertools.islice(itertools.product(LETTERS, repeat=4), 60)]
    records = []
    for i, head in enumerate(heads):
        tail = heads[i // 2]
        for j in range(5):
            middle = "".join(random.choice(list(LETTERS), 10))
            records.append((f"S{i:02d}{j}", head + middle + tail))
    return records


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    records = family_records()
    # A repeat under a later name, and one under an earlier name.
    records += [("Z999", records[3][1]), ("A000", records[4][1])]
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_text("".join(f">sp|{name}|X_Y words\n{s}\n" for name, s in records))
    return path


@pytest.fixture(autouse=True, scope="module")
def mmseqs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = stand_in.install(tmp_path_factory.mktemp("mmseqs") / "bin")
        patch.setenv("PATH", str(folder), prepend=":")
        yield


def prepare(fasta, output, options=OPTIONS, **more):
    return prepare_corpus(open_source([fasta], output), output, options, **more)


@pytest.fixture(scope="module")
def prepared(fasta, mmseqs, tmp_path_factory):
    """The folder and the manifest of a corpus."""
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    return folder, prepare(fasta, folder)


def held_out_tails(corpus):
    """Last residues of what is held out, which nothing else has: there are no relatives in it."""
    tails = {}
    for split in SPLITS:
        shards = corpus.split(split)
        tails[split] = {shards.sequence(i)[-4:] for i in range(len(shards))}
    ood = tails.pop("ood")
    assert ood
    assert not ood & set.union(*tails.values())
    return ood


def check_splits(folder, manifest, sequences, cluster, drawn_by):
    """Splits are those of a computation in memory that owes the stages nothing.

    Sequences by name, in the order of the file; the cluster of each, and what draws its split.
    """
    corpus = Corpus(folder)
    names = {split: corpus.split(split).names for split in SPLITS}
    split_of = {name: split for split in SPLITS for name in names[split]}
    assert split_of.keys() == sequences.keys()
    for split in SPLITS:
        shards, clusters = corpus.split(split), {cluster[name] for name in names[split]}
        assert names[split] == [name for name in sequences if split_of[name] == split]
        for index, (name, tokens) in enumerate(shards.named()):
            assert (name, shards.sequence(index)) == (names[split][index], sequences[name])
            np.testing.assert_array_equal(tokens, shards[index])
        assert manifest["splits"][split]["clusters"] == len(clusters)
        if split == "ood" or drawn_by is cluster:
            assert not clusters & {cluster[n] for n in sequences if split_of[n] != split}
        if split != "train":
            text = gzip.decompress((folder / f"{split}.fasta.gz").read_bytes()).decode()
            lines = [f">{n} family={cluster[n]}\n{sequences[n]}\n" for n in names[split]]
            assert text == "".join(lines)
    assert manifest["clusters"] == len(set(cluster.values()))
    held_out_tails(corpus)
    seed = manifest["options"]["seed"]
    rest = [name for name in sequences if split_of[name] != "ood"]
    rest.sort(key=lambda n: hashlib.sha256(f"{seed}:sequences:{drawn_by[n]}".encode()).digest())
    order = [split_of[name] for name in rest]
    assert order == sorted(order, key=["validation", "test", "train"].index)
    assert 25 < order.count("validation") <= 30
    assert 20 < order.count("test") <= 30


def test_splits(prepared):
    folder, manifest = prepared
    sequences = dict(family_records())
    sequences["A000"] = sequences.pop("S004")
    sequences = dict(sorted(sequences.items()))
    first = {}
    cluster = {name: first.setdefault(s[:4], name) for name, s in sequences.items()}
    check_splits(folder, manifest, sequences, cluster, {name: name for name in sequences})
    counts = {"records": 302, "left_out": 0, "distinct": 300, "residues": 300 * 18}
    assert manifest["read"] == counts
    # Whole pairs of clusters.
    pairs = len(held_out_tails(Corpus(folder)))
    ood = manifest["splits"]["ood"]
    assert (ood["sequences"], ood["clusters"]) == (10 * pairs, 2 * pairs)
    assert not (folder / "work").exists()


@pytest.mark.parametrize("given", [False, True])
def test_names_that_mmseqs_takes_for_others(tmp_path, given):
    """``lcl|S300`` of one family, and ``S300`` of another that is no relative."""
    records = family_records()
    names = [name for name, _ in records]
    names[:150] = [f"lcl|{name}" for name in names[150:]]
    sequences = {name: s for name, (_, s) in zip(names, records, strict=True)}
    path, table = tmp_path / "x.fasta", tmp_path / "x.tsv"
    path.write_text("".join(f">{name}\n{s}\n" for name, s in sequences.items()))
    table.write_text("".join(f"{s[:4]}\t{name}\n" for name, s in sequences.items()))
    prepare(path, tmp_path / "corpus", clusters=table if given else None)
    corpus = Corpus(tmp_path / "corpus")
    assert {name for split in SPLITS for name in corpus.split(split).names} == sequences.keys()
    held_out_tails(corpus)


def test_a_search_that_reports_few_hits_misses_no_relative(fasta, tmp_path, monkeypatch):
    monkeypatch.setattr("performers.proteins.corpus.relatives._HITS_PER_QUERY", 1)
    manifest = prepare(fasta, tmp_path / "corpus")
    held_out_tails(Corpus(tmp_path / "corpus"))
    # The last search found nothing.
    assert manifest["ood_searches"][-1]["related"] == 0
    assert any(search["related"] for search in manifest["ood_searches"])


@pytest.mark.parametrize("stop_before", ["cluster", "easy-search"])
def test_stopped_and_continued(fasta, prepared, tmp_path, monkeypatch, stop_before):
    from performers.proteins.corpus import mmseqs as module

    run = module.Mmseqs.run

    def stops(self, *arguments, **options):
        if arguments[0] == stop_before:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.Mmseqs, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare(fasta, tmp_path / "parts")
    assert not (tmp_path / "parts" / "manifest.json").exists()
    stages = []
    assert prepare(fasta, tmp_path / "parts", report=stages.append) == prepared[1]
    assert not any("reading" in stage for stage in stages)
    assert any("clustering" in stage for stage in stages) == (stop_before == "cluster")


def test_finished_corpus_is_left_alone(fasta, prepared):
    folder, first = prepared
    said = []
    assert prepare(fasta, folder, report=said.append) == first
    assert said == ["the corpus is there already"]
    (file,) = first["source"]["files"]
    assert (file["name"], file["bytes"]) == ("proteins.fasta", fasta.stat().st_size)
    assert first["source"]["licence"] == "not stated"
    assert first["mmseqs_version"] == "stand-in"
    # Stopped between the manifest and the removal of its work.
    (folder / "work").mkdir()
    prepare(fasta, folder)
    assert not (folder / "work").exists()
    other = CorpusOptions(validation_fraction=0.2, test_fraction=0.1, ood_fraction=0.1)
    with pytest.raises(UserError, match="another corpus"):
        prepare(fasta, folder, other)


def test_own_clusters(fasta, tmp_path):
    table = tmp_path / "mine.tsv"
    sequences = dict(family_records())
    sequences["A000"] = sequences.pop("S004")
    table.write_text("".join(f"C{s[-4:]}\t{name}\n" for name, s in sequences.items()))
    manifest = prepare(fasta, tmp_path / "corpus", clusters=table)
    assert manifest["clusters"] == 30
    assert manifest["splits"]["ood"]["sequences"] == 30
    table.write_text(table.read_text() + "nobody\tnobody\n")
    with pytest.raises(UserError, match="another corpus"):
        prepare(fasta, tmp_path / "corpus", clusters=table)
    with pytest.raises(UserError, match=r"mine\.tsv lists 301 members, but there are 300"):
        prepare(fasta, tmp_path / "other", clusters=table)


def test_what_cannot_be_prepared_is_refused(fasta, tmp_path, monkeypatch):
    (tmp_path / "p.fasta").write_text(">A\nMKV\n>A\nMKVL\n")
    output = tmp_path / "corpus"
    url = "https://example.org/x.fasta.gz"
    for call, message in (
        *(
            (lambda options=options: CorpusOptions(**options), r"--\w")
            for options in (
                {"identity": 0.0},
                {"test_fraction": 1.0},
                {"ood_fraction": 0.5, "test_fraction": 0.5},
                {"sensitivity": 9.0},
                {"max_evalue": 0.0},
            )
        ),
        (lambda: prepare(tmp_path / "p.fasta", output), "both named A"),
        (lambda: open_source([fasta], tmp_path, url=url), "--url is where"),
        (lambda: open_source([tmp_path], tmp_path), "is a folder; name the FASTA files in it"),
        (lambda: open_source([tmp_path / "none"], tmp_path), "--source .*none does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert open_source([fasta], tmp_path, licence="mine").description["licence"] == "mine"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="install mmseqs2"):
        prepare(fasta, output / "new")
