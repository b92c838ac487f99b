"""Archives read in place give what unpacking gives, and say in one sentence why they cannot be read."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.photos import archives
from pipelines.photos.decode import DecodeError
from pipelines.photos.roots import Root
from runtime.errors import UserError

FILES = {
    "b/2.jpg": b"two",
    "b/1.jpg": b"one" * 500,
    "b/c/deep.png": b"",
    "a.txt": b"\xef\xbb\xbfone\ntwo",
    "b-x/0.jpg": b"x",
}


def make_tar(path: Path, files: dict[str, bytes], kind: str = "w") -> Path:
    with tarfile.open(path, kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1000
            tar.addfile(member, io.BytesIO(data))
    return path


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 2, 3, 4, 6)), data, method)
    return path


MAKERS = {
    "tar": lambda path, files: make_tar(path / "x.tar", files),
    "pax tar with dots": lambda path, files: make_tar(path / "x.tar", {f"./{n}": d for n, d in files.items()}),
    "stored zip": lambda path, files: make_zip(path / "x.zip", files),
    "packed zip": lambda path, files: make_zip(path / "x.zip", files, zipfile.ZIP_DEFLATED),
}


@pytest.fixture(params=MAKERS)
def packed(request, tmp_path) -> Path:
    return MAKERS[request.param](tmp_path, FILES)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(data)
    return tmp_path / "x"


def everything(root: Root, at: str = "") -> dict:
    """What a root says of all that is below `at`, times left out."""
    below = f"{at}/" if at else ""
    return {
        "top": (root.ls(at), root.files(at), root.folders(at)),
        "b": (root.ls(f"{below}b"), root.files(f"{below}b"), root.folders(f"{below}b"), root.ls(f"{below}none")),
        "is": [(root.exists(below + p), root.isdir(below + p)) for p in ("a.txt", "b", "b/1.jpg", "b/1", "c", "b/c")],
        "bytes": {path: root.read(below + path) for path in FILES},
        "sizes": {path: root.info(below + path)[0] for path in FILES},
        "lines": list(root.lines(f"{below}a.txt")),
    }


def test_archive_as_root_reads_like_the_folder(packed, folder):
    expected = everything(Root(str(folder)))
    assert everything(Root(str(packed))) == expected
    assert everything(Root(str(packed.parent)), packed.name) == expected


def test_index_is_made_once_and_read_by_other_processes(packed, monkeypatch):
    first = Root(str(packed))
    assert first.read("b/1.jpg") == FILES["b/1.jpg"]

    def fail(_):
        raise AssertionError("the archive is walked again")

    monkeypatch.setattr(archives, "_tar_rows", fail)
    monkeypatch.setattr(archives, "_zip_rows", fail)
    assert Root(str(packed)).read("b/2.jpg") == b"two"
    assert pickle.loads(pickle.dumps(first)).read("b/2.jpg") == b"two"


def test_changed_archive_is_indexed_again_and_the_old_index_goes(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a": b"1"})
    assert Root(str(path)).files() == ["a"]
    make_tar(path, {"a": b"1", "b": b"22"})
    os.utime(path, (5, 5))
    assert Root(str(path)).files() == ["a", "b"]
    assert len(list(archives._cache().glob("*.arrow"))) == 1


def test_user_without_a_home_has_no_cache(packed, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and an entry in /etc/passwd
    assert archives._cache() is None
    assert Root(str(packed)).read("b/2.jpg") == b"two"


def test_cache_that_cannot_be_written_costs_only_time(packed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert Root(str(packed)).read("b/2.jpg") == b"two"


def test_times_are_the_files_own_or_else_the_archives(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a": b"1"})
    assert Root(str(path)).info("a") == (1, 1000.0)
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a"))  # time 0, as reproducible archives have it
    os.utime(path, (7000, 7000))
    assert Root(str(path)).info("a") == (0, 7000.0)


def test_zip_entry_without_a_date_has_the_archives_time(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a": b"1", "b": b"22"})
    dated = path.read_bytes()
    none = dated.replace(struct.pack("<H", (2020 - 1980) << 9 | 1 << 5 | 2), b"\0\0")  # month and day 0
    assert none.count(b"\0\0") > dated.count(b"\0\0")
    path.write_bytes(none)
    os.utime(path, (7000, 7000))
    assert Root(str(path)).info("b") == (2, 7000.0)
    assert Root(str(path)).read("a") == b"1"


def test_later_file_of_a_name_replaces_the_earlier(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a": b"old", "b": b"b"})
    make_tar(path, {"a": b"newer"}, "a")
    assert Root(str(path)).files() == ["a", "b"]
    assert Root(str(path)).read("a") == b"newer"


def test_links_lead_to_their_file_and_dangling_ones_are_unreadable(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"d/a.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("d/hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("soft.jpg", tarfile.SYMTYPE, "d/a.jpg"),
            ("d/up.jpg", tarfile.SYMTYPE, "../d/a.jpg"),
            ("lost.jpg", tarfile.SYMTYPE, "elsewhere.jpg"),
            ("out.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
            ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("to_later.jpg", tarfile.SYMTYPE, "to_last.jpg"),
            ("to_last.jpg", tarfile.SYMTYPE, "d/a.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    root = Root(str(path))
    assert [root.read(name) for name in ("d/hard.jpg", "soft.jpg", "d/up.jpg", "to_later.jpg")] == [b"1"] * 4
    for name in ("lost.jpg", "out.jpg", "loop.jpg"):
        with pytest.raises(DecodeError, match="unreadable: a link that leads to no file of the archive"):
            root.read(name)


@pytest.mark.parametrize("prefix", ["../", "../../", "/", "/../", "./", "b/../"])
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_paths_stay_below_the_root(tmp_path, make, prefix):
    root = Root(str(make(tmp_path / ("x.tar" if make is make_tar else "x.zip"), {f"{prefix}mug/1.jpg": b"1"})))
    assert root.folders() == ["mug"] and root.read("mug/1.jpg") == b"1"


def test_names_that_are_not_utf_8_are_read_or_refused_where_they_cannot_be_told_apart(tmp_path):
    files = {"a/caf\udce9.jpg": b"1", "b/caf\udce8.jpg": b"2"}
    root = Root(str(make_tar(tmp_path / "x.tar", files)))
    assert [root.read(f"{folder}/caf\ufffd.jpg") for folder in "ab"] == [b"1", b"2"]
    with pytest.raises(
        UserError, match=r"several names like a/caf\ufffd.jpg are not UTF-8 and cannot be .*; .* unpack"
    ):
        Root(str(make_tar(tmp_path / "y.tar", files | {"a/caf\udce8.jpg": b"2"}))).files()


def test_no_more_is_unpacked_than_the_index_promises(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a": b"0" * 100_000}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 100_000), struct.pack("<I", 10)))
    with pytest.raises(DecodeError, match=r"unreadable: x\.zip is damaged at a \(checksum\)"):
        Root(str(path)).read("a")


def test_what_is_not_in_the_archive_reads_as_a_missing_file(packed):
    root = Root(str(packed))
    for call in (root.read, root.info):
        with pytest.raises(FileNotFoundError):
            call("b/3.jpg")
    with pytest.raises(UserError, match=rf"'{packed}/none' does not exist"):
        Root(f"{packed}/none")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_file_in_a_zip_is_noticed(tmp_path, method):
    path = make_zip(tmp_path / "x.zip", {"a": b"some bytes " * 20}, method)
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DecodeError, match=r"unreadable: .* damaged at a"):
        Root(str(path)).read("a")
    with pytest.raises(UserError, match=r"x\.zip/a cannot be read .*damaged at a"):
        list(Root(str(tmp_path)).lines("x.zip/a"))


def test_archive_cut_off_is_named_with_what_to_do(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a": b"1" * 2000, "b": b"2" * 2000})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"x\.tar' cannot be read in place .*unpack it"):
        Root(str(path)).files()
    make_zip(tmp_path / "y.zip", {"a": b"1"})
    (tmp_path / "y.zip").write_bytes((tmp_path / "y.zip").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"y\.zip' cannot be read in place"):
        Root(str(tmp_path / "y.zip")).files()


def test_compressed_tar_is_refused_and_named_where_it_lies_at_a_root(tmp_path, caplog):
    make_tar(tmp_path / "x.tar", FILES, "w:gz")
    with pytest.raises(UserError, match="cannot be read in place"):
        Root(str(tmp_path / "x.tar")).files()
    (tmp_path / "x.tar").rename(tmp_path / "train_0.tar.gz")
    assert Root(str(tmp_path)).archives() == {}
    assert "train_0.tar.gz is skipped" in caplog.text


def test_archives_at_a_root_go_by_name_and_skip_a_folder_of_their_own_name(tmp_path):
    make_tar(tmp_path / "flat.tar", {"a.jpg": b""})
    make_tar(tmp_path / "same.tar", {"same/a.jpg": b"", "same/b.jpg": b""})
    make_zip(tmp_path / "both.zip", {"both/a.jpg": b"", "more.jpg": b""})
    make_zip(tmp_path / "here.zip", {"a.jpg": b""})
    (tmp_path / "here").mkdir()
    assert Root(str(tmp_path)).archives() == {"both": "both.zip", "flat": "flat.tar", "same": "same.tar/same"}


def test_archive_behind_a_url_is_read_by_offsets(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/archives-of-test/x.tar", make_tar(tmp_path / "x.tar", FILES).read_bytes())
    assert Root("memory://archives-of-test/x.tar/b").read("1.jpg") == FILES["b/1.jpg"]
    assert Root("memory://archives-of-test").read("x.tar/b/2.jpg") == b"two"
    memory.rm("/archives-of-test", recursive=True)


names = st.lists(st.text("ab-./0é", min_size=1, max_size=5).filter(lambda t: t.strip("./")), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names.map("/".join), st.binary(max_size=9), max_size=12))
def test_any_names_list_as_the_set_of_their_paths(tmp_path_factory, files):
    clean = {plain: data for name, data in files.items() if (plain := archives._plain(name)) not in ("", ".")}
    path = make_tar(tmp_path_factory.mktemp("any") / "x.tar", clean)
    root = Root(str(path.parent))
    for folder in {"", *(str(parent) for name in clean for parent in Path(name).parents if str(parent) != ".")}:
        inside = {name[len(folder) :].lstrip("/") for name in clean if not folder or name.startswith(f"{folder}/")}
        at = f"x.tar/{folder}".rstrip("/")
        assert root.files(at) == sorted(n for n in inside if "/" not in n)
        assert root.folders(at) == sorted({n.split("/")[0] for n in inside if "/" in n})
    for name, data in clean.items():
        assert root.read(f"x.tar/{name}") == data


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("raw", "name"), [("café", "café"), ("cafe\u0301", "cafe\u0301"), ("カップ", "カップ"), ("a b", "a b")]
)
def test_zip_names_are_utf_8_with_and_without_the_flag_for_it(tmp_path, raw, name, flag):
    data = bytearray(make_zip(tmp_path / "x.zip", {f"{raw}/1.jpg": b"1"}).read_bytes())
    for signature, at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        data[data.find(signature) + at] = 8 if flag else 0
    (tmp_path / "x.zip").write_bytes(data)
    root = Root(str(tmp_path / "x.zip"))
    assert root.folders() == [name] and root.read(f"{name}/1.jpg") == b"1"


def test_zip_names_of_older_programs_stay_in_their_code_page(tmp_path):
    data = make_zip(tmp_path / "x.zip", {"cafX/1.jpg": b"1"}).read_bytes().replace(b"cafX", b"caf\x82")
    (tmp_path / "x.zip").write_bytes(data)
    assert Root(str(tmp_path / "x.zip")).folders() == ["café"]
