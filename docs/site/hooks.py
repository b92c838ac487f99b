"""Hooks of mkdocs: pages that are made from other files of the repository, and links to its code.

README.md and CONTRIBUTING.md become pages; every package of the code gets a page of the API reference; files that pages
link to are shown as pages of their own; the toybox's report is the example, where `make repro` has made one.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "pipelines", "train", "eval", "runtime")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""File at the root -> its page."""
REPORT = ROOT / "data" / "report" / "index.html"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".toml": "toml",
    ".html": "html",
    ".md": "markdown",
}
FENCED = re.compile(r"^(`{3,}|~~~).*?^\1", re.DOTALL | re.MULTILINE)
EXAMPLE = """# An example report

What `make repro` writes on the toybox: images, scores with intervals, curves, masks and the data that led to them.

{body}
"""


def on_config(config: Any) -> Any:
    """Append the API reference to the navigation."""
    rooms = [
        {room: [{name: reference_page(name)} for name in packages() if name.split(".")[0] == room]} for room in PACKAGES
    ]
    config["nav"].append({"API": rooms})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    texts = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    texts |= {reference_page(package): reference(package) for package in packages()}
    texts["example.md"] = example()
    texts["tutorial.md"] = notebook(ROOT / "docs" / "tutorial.ipynb")
    if REPORT.is_file():
        files.append(File.generated(config, "report.html", abs_src_path=str(REPORT)))
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    of_docs = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    of_root = [(name, texts[page]) for name, page in PAGES.items()]
    for name in sorted({target for origin, text in of_docs + of_root for target in linked(origin, text)}):
        if page := source_page(name):
            files.append(File.generated(config, page, content=source(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of the files that they name."""
    origin = {made: name for name, made in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        found = page_of(resolved(origin, match[1]))
        return match[0] if found is None else posixpath.relpath(found, here or ".") + (match[2] or "")

    kept: list[str] = []  # code is left as it is

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = LINK.sub(replaced, FENCED.sub(keep, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], text)


def resolved(origin: str, target: str) -> str:
    """A link's target as a path from the root; origin: the linking file."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def linked(origin: str, text: str) -> set[str]:
    """Files and folders of the repository that a text links to."""
    found = {resolved(origin, match[1]) for match in LINK.finditer(FENCED.sub("", text))}
    return {name for name in found if (ROOT / name).exists()}


def page_of(name: str) -> str | None:
    """The page or file of the site for a path of the repository; None for what is not in it."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return source_page(name) or (reference_page(name.replace("/", ".")) if (ROOT / name).is_dir() else None)


def source_page(name: str) -> str | None:
    """The page that shows a file; None for pages, folders and images."""
    text = (ROOT / name).suffix in LANGUAGES and (ROOT / name).is_file()
    return f"source/{name}.md" if text and name not in PAGES and not name.startswith("docs/") else None


def source(name: str) -> str:
    """A page with a file's text."""
    text = (ROOT / name).read_text(encoding="utf-8").rstrip()
    return f"# {name}\n\n{fenced(text, LANGUAGES[Path(name).suffix])}\n"


def packages() -> list[str]:
    """All packages of the code, dotted."""
    found = [file.parent for name in PACKAGES for file in sorted((ROOT / name).rglob("__init__.py"))]
    return [".".join(folder.relative_to(ROOT).parts) for folder in found]


def reference_page(package: str) -> str:
    """Where the API reference of a package is."""
    return f"api/{package}.md"


def reference(package: str) -> str:
    """The API reference of a package's own modules."""
    modules = sorted((ROOT / package.replace(".", "/")).glob("*.py"))
    names = [f"{package}.{file.stem}" for file in modules if not file.stem.startswith("_")]
    return "\n".join([f"# {package}\n", shown(package, "show_root_heading: false"), *map(shown, names)])


def shown(module: str, *options: str) -> str:
    """What mkdocstrings replaces by a module's docstrings."""
    return f"::: {module}\n    options: {{{', '.join(('show_submodules: false', *options))}}}\n"


def notebook(file: Path) -> str:
    """A notebook with its stored outputs as a page."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else fenced(text, "python"))
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(fenced("".join(output["text"]).rstrip(), "text"))
            for kind in ("image/svg+xml", "image/png"):
                if kind in output.get("data", {}):
                    parts.append(picture(kind, "".join(output["data"][kind])))
    return "\n\n".join(parts) + "\n"


def picture(kind: str, content: str) -> str:
    """An image in a page; content: base64, or an SVG's text."""
    data = base64.b64encode(content.encode()).decode() if kind == "image/svg+xml" else content.replace("\n", "")
    return f'<img alt="output" src="data:{kind};base64,{data}">'


def fenced(text: str, language: str) -> str:
    """A block of code; five ticks, as the text may hold three."""
    fence = "`" * 5
    return f"{fence}{language}\n{text}\n{fence}"


def example() -> str:
    """The page of the example report."""
    found = (
        "[Open the report](report.html){target=_blank}" if REPORT.is_file() else "Run `make repro`, then `make docs`."
    )
    return EXAMPLE.format(body=found)
