"""The files that hosts and tools read from the root: each parses, and says what the others say."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from typing import Any

import pytest
import yaml

from runtime.closure import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = ROOT / ".github"
HOSTED = [*sorted(GITHUB.rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("file", HOSTED, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_is_a_yaml_mapping(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_changelog_s_newest_version_is_the_project_s_and_dates_fall():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(released)
    found = [(match[1], date.fromisoformat(match[2])) for match in released if match]
    assert found[0][0] == PROJECT["version"]
    assert [day for _, day in found] == sorted((day for _, day in found), reverse=True)


def test_citation_is_of_the_project_s_version_and_licence():
    cited = read("CITATION.cff")
    assert (cited["version"], cited["license"], cited["cff-version"]) == (
        PROJECT["version"],
        PROJECT["license"],
        "1.2.0",
    )
    assert f"## [{cited['version']}] - {cited['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()
    for work in (cited, *cited["references"]):
        assert work["title"] and work["type"] and work["authors"]
        assert all(author.keys() in ({"name"}, {"given-names", "family-names"}) for author in work["authors"])
    assert cited["references"][0]["url"] in (ROOT / "README.md").read_text()


def test_ci_runs_the_project_s_checks_on_every_supported_python():
    job = read(".github/workflows/ci.yml")["jobs"]["check"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    low, high = map(int, re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(low, high)]


def test_hooks_are_those_of_make_lint_with_the_environment_s_tools():
    lint = re.findall(r"^\t\$\(BIN\)/(.+)$", (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0], re.M)
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert [entry.removeprefix(".venv/bin/").replace(" --force-exclude", "") for entry in hooks] == [
        command.removesuffix(" .") for command in lint
    ]


def test_forms_have_what_the_host_asks_for():
    for file in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")):
        form = yaml.safe_load(file.read_text())
        if file.stem != "config":
            assert form["name"] and form["description"]
            ids = [field["id"] for field in form["body"]]
            assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
