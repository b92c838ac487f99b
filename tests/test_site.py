"""The site: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.closure import ROOT

LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?https?:|<link[^>]*\bhref=\"?https?:|@import|url\(\"?https?:"
)


@pytest.mark.slow
def test_site_builds_without_warnings_and_needs_no_network(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {str(file.relative_to(tmp_path)): file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.html")}
    report = pages.pop("report.html", "")  # self-contained: its own test
    assert report == "" or "<html" in report
    loading = {name: found[0] for name, text in pages.items() if (found := LOADED.findall(text))}
    assert not loading
    assert "Two commands" in pages["index.html"] and "CustomContrastPipeline" in pages["api/model.pipeline.html"]
    assert 'href="source/params.yaml.html"' in pages["index.html"]
    assert "iframe-worker" in (tmp_path / "site" / "iframe-worker.js").read_text(encoding="utf-8")
