"""Folders, archives and URLs of photos, read one way."""

import os
import pickle
import zipfile
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest

from pipelines.photos.decode import DecodeError
from pipelines.photos.roots import Root, Roots
from pipelines.sources import SourceParams
from runtime.errors import UserError


def test_file_out_of_reach_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"a photo")
    root = Root(str(tmp_path))
    for path in ("b.jpg", "a.jpg/b", ""):
        with pytest.raises(FileNotFoundError):
            root.read(path)
    with pytest.raises(FileNotFoundError):
        root.info("b.jpg")
    for error in (PermissionError("not yours"), TimeoutError("too slow"), RuntimeError("the store said no")):
        for name in ("cat_file", "info"):
            monkeypatch.setattr(root._fs, name, Mock(side_effect=error))
        for ask in (root.read, root.info):
            with pytest.raises(UserError, match=f"a.jpg cannot be read .{error}.; .* run the same command again"):
                ask("a.jpg")


@pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("the store said no")])
def test_nothing_out_of_reach_is_taken_for_absent(tmp_path, monkeypatch, error):
    (tmp_path / "captions.csv").write_text("path,caption\n")
    root = Root(str(tmp_path))
    for name in ("ls", "info", "isdir", "open"):
        monkeypatch.setattr(root._fs, name, Mock(side_effect=error))
    for ask in (root.ls, root.files, root.folders, root.exists, root.isdir):
        with pytest.raises(UserError, match=f"captions.csv cannot be read .{error}.; .* run the same command again"):
            ask("captions.csv")
    with pytest.raises(UserError, match=f"captions.csv cannot be read .{error}."):
        list(root.lines("captions.csv"))
    for ask in (root.read, root.info, root.files):
        with pytest.raises(UserError, match=f"x.zip/1.jpg cannot be read .{error}."):
            ask("x.zip/1.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in ("b/2.jpg", "b/1.jpg", "a.txt", ".hidden"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return tmp_path


def test_root_lists_and_reads_relative_paths(folder):
    root = Root(str(folder))
    assert root.ls() == [".hidden", "a.txt", "b"]
    assert root.files() == [".hidden", "a.txt"]
    assert root.folders() == ["b"]
    assert root.files("b") == ["1.jpg", "2.jpg"]
    assert root.read("b/1.jpg") == b"b/1.jpg"
    assert root.exists("b") and root.isdir("b") and not root.isdir("a.txt") and not root.exists("c")
    assert root.info("b/1.jpg") == (7, (folder / "b/1.jpg").stat().st_mtime)


def test_what_is_not_there_lists_as_nothing_and_reads_as_a_missing_file(folder):
    root = Root(str(folder))
    assert root.ls("c") == [] and root.files("a.txt/x") == []
    for call in (root.read, root.info):
        with pytest.raises(FileNotFoundError):
            call("c")


def test_links_to_folders_and_files_are_followed(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "link").symlink_to(folder / "b")
    (other / "photo.jpg").symlink_to(folder / "b/1.jpg")
    root = Root(str(other))
    assert (root.folders(), root.files(), root.files("link")) == (["link"], ["photo.jpg"], ["1.jpg", "2.jpg"])


def test_url_works_like_a_folder():
    memory = fsspec.filesystem("memory")
    memory.pipe("/photos-of-test/x/1.jpg", b"one")
    root = Root("memory://photos-of-test")
    assert (root.folders(), root.files("x")) == (["x"], ["1.jpg"])
    assert root.exists("x") and root.exists("x/1.jpg") and not root.exists("x/2.jpg")
    assert root.read("x/1.jpg") == b"one"
    assert root.info("x/1.jpg")[0] == 3
    memory.rm("/photos-of-test", recursive=True)


def test_root_travels_to_workers(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    root = Root(folder.name)
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(root)).read("a.txt") == b"a.txt"


def test_relative_root_is_the_same_folder_for_a_worker_elsewhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    source = SourceParams(name="own", layout="folder", root=folder.name, split="train")
    sent = pickle.dumps([source])
    monkeypatch.chdir("/")
    root = Roots(pickle.loads(sent))["own"]
    assert root.read("a.txt") == b"a.txt"
    assert root.name("a.txt") == f"{folder.name}/a.txt"  # as written, for tables must not tell where they were made
    assert source.model_dump(exclude_unset=True) == {
        "name": "own",
        "layout": "folder",
        "root": folder.name,
        "split": "train",
    }


@pytest.mark.parametrize("url", ["nowhere/photos", "no-such-protocol://photos"])
def test_missing_root_is_named_with_what_to_do(url):
    with pytest.raises(UserError, match=rf"'{url}'.*params\.yaml"):
        Root(url)


def test_lines_drop_the_byte_order_mark_and_keep_line_ends(folder):
    (folder / "a.txt").write_bytes("\ufeffeins\r\nzwei é".encode())
    assert list(Root(str(folder)).lines("a.txt")) == ["eins\r\n", "zwei é"]
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        list(Root(str(folder)).lines("a.txt"))
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        list(Root(str(folder)).lines("none.txt"))


def test_roots_are_found_by_source_name(folder):
    def params(name: str) -> SourceParams:
        return SourceParams(name=name, layout="folder", root=str(folder), split="train")

    roots = Roots([params("one"), params("two")])
    assert roots["one"] is roots["one"]
    assert roots["two"].exists("a.txt")
    with pytest.raises(UserError, match="no source 'three'"):
        roots["three"]
    with pytest.raises(UserError, match="two sources 'one'"):
        Roots([params("one"), params("one")])


def test_name_like_a_chain_of_file_systems_is_a_folder(tmp_path):
    (tmp_path / "a::b" / "x").mkdir(parents=True)
    (tmp_path / "a::b" / "x" / "1.jpg").write_bytes(b"one")
    root = Root(str(tmp_path / "a::b"))
    assert root.folders() == ["x"] and root.read("x/1.jpg") == b"one"


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert Root("~/b").files() == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("target", ["x.jpg", "nothing.jpg", "b/1.jpg/below"])
def test_link_that_leads_nowhere_is_unreadable(folder, target):
    (folder / "x.jpg").symlink_to(target)
    root = Root(str(folder))
    assert "x.jpg" in root.files() and root.files("x.jpg") == []
    with pytest.raises(FileNotFoundError):
        root.info("x.jpg")
    with pytest.raises(DecodeError, match="unreadable: a link that leads nowhere"):
        root.read("x.jpg")


def test_link_to_a_folder_that_it_is_in_is_no_folder_and_no_photo(folder):
    for name, target in (("here.jpg", "."), ("up", ".."), ("beside", "../c")):
        (folder / "b" / name).symlink_to(target)
    (folder / "c").mkdir()
    root = Root(str(folder))
    assert (root.folders("b"), root.files("b")) == (["beside"], ["1.jpg", "2.jpg", "here.jpg", "up"])
    with pytest.raises(DecodeError, match="unreadable: a link to a folder"):
        root.read("b/here.jpg")


def test_names_are_shown_on_one_line(folder):
    assert Root(str(folder)).name("a\nb\t\u200b/é.jpg") == f"{folder}/a\\nb\\t\\u200b/é.jpg"


def test_pipe_is_unreadable_and_waits_for_nobody(folder):
    os.mkfifo(folder / "x.jpg")
    with pytest.raises(DecodeError, match="unreadable: a pipe"):
        Root(str(folder)).read("x.jpg")


def test_names_that_are_not_utf_8_are_shown_with_a_replacement_and_read(folder):
    (folder / "d\udce9").mkdir()
    (folder / "d\udce9" / "caf\udce9.jpg").write_bytes(b"one")
    for root in (Root(str(folder)), pickle.loads(pickle.dumps(Root(str(folder))))):
        assert root.read("d\ufffd/caf\ufffd.jpg") == b"one" and root.exists("d\ufffd/caf\ufffd.jpg")
        assert root.folders() == ["b", "d\ufffd"] and root.files("d\ufffd") == ["caf\ufffd.jpg"]
        assert root.isdir("d\ufffd") and root.info("d\ufffd/caf\ufffd.jpg")[0] == 3
    (folder / "d\udce9" / "caf\udce8.jpg").write_bytes(b"two")
    with pytest.raises(UserError, match="told apart; rename"):
        root.files("d\ufffd")
    with pytest.raises(UserError, match="has a name that is not UTF-8; rename it"):
        Root(str(folder / "d\udce9"))


@pytest.mark.parametrize(
    ("name", "below", "message"),
    [
        ("x.tar.gz", "", "x.tar.gz is a compressed archive, which cannot be read in place; .* unpacked or in a tar"),
        ("x.tgz", "/mvi", "x.tgz is a compressed archive"),
        ("x.7z", "", "x.7z is a compressed archive"),
        ("photo.jpg", "", "photo.jpg is no folder, tar or zip; put"),
    ],
)
def test_root_that_is_a_file_is_named_with_what_to_do(tmp_path, name, below, message):
    (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UserError, match=message):
        Root(f"{tmp_path / name}{below}")


def test_archive_without_a_file_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w"):
        pass
    with pytest.raises(UserError, match=r"archive '.*x.zip' holds no file; put"):
        Root(str(tmp_path / "x.zip"))
