"""Licences: one name for every spelling, what each asks, and what is against the purpose of a run."""

from dataclasses import replace

import pytest

from pipelines import tables
from pipelines.photos import licences
from tests.world.tables import frame, triplet, write


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://creativecommons.org/licenses/by/2.0/", "CC-BY-2.0"),
        ("http://www.creativecommons.org/licenses/by-nc-sa/2.0/uk/", "CC-BY-NC-SA-2.0-UK"),
        ("https://creativecommons.org/licenses/by-nc/4.0/deed.en", "CC-BY-NC-4.0"),
        ("creativecommons.org/licenses/by-sa/4.0/legalcode", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "CC-PDM-1.0"),
        ("https://www.usa.gov/government-works", "LicenseRef-US-Government-Work"),
        ("CC BY 4.0", "CC-BY-4.0"),
        ("cc-by-nc-nd-2.0", "CC-BY-NC-ND-2.0"),
        ("CC  BY 3.0 Unported", "CC-BY-3.0"),
        (
            "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International Public License",
            "CC-BY-NC-ND-4.0",
        ),
        ("Attribution-NonCommercial License", "CC-BY-NC"),  # Flickr's names have no version
        ("Attribution-NoDerivs License", "CC-BY-ND"),
        ("Public Domain Dedication (CC0)", "CC0-1.0"),
        ("CC0", "CC0-1.0"),
        ("Public Domain Mark", "CC-PDM-1.0"),
        ("United States Government Work", "LicenseRef-US-Government-Work"),
        ("apache-2.0", "Apache-2.0"),
        ("MIT License", "MIT"),
        (" Unsplash  License\n", "Unsplash License"),
        ("Attribution to the museum", "Attribution to the museum"),
        ("CC BY 4.0 except for sales", "CC BY 4.0 except for sales"),
        ("CC0 except for sales", "CC0 except for sales"),
        ("https://creativecommons.org/licenses/sampling/1.0/", "https://creativecommons.org/licenses/sampling/1.0/"),
        (" ", None),
        (None, None),
    ],
)
def test_a_licence_has_one_name(text, name):
    assert licences.normalised(text) == name == licences.normalised(name)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("CC-BY-2.0", licences.Terms()),
        ("CC-BY-NC", licences.Terms(non_commercial=True)),
        ("CC-BY-NC-SA-2.0-UK", licences.Terms(non_commercial=True, share_alike=True)),
        ("CC-BY-ND-4.0", licences.Terms(no_derivatives=True)),
        ("CC0-1.0", licences.Terms()),
        (licences.CELEBA, licences.Terms(non_commercial=True, no_copies=True)),
        ("Unsplash License", None),
        (None, None),
    ],
)
def test_terms_of_a_licence(name, terms):
    assert licences.terms(name) == terms


def test_patterns_are_names_in_any_spelling_or_have_stars():
    names = ("CC-BY-2.0", "CC-BY-NC-2.0", "CC0-1.0", "Unsplash License", None)
    for patterns, kept in (
        (["CC-BY-*"], names[:2]),
        (["cc by 2.0", "https://creativecommons.org/publicdomain/zero/1.0/"], ("CC-BY-2.0", "CC0-1.0")),
        (["unsplash license", "unknown"], names[3:]),
        (["*"], names),
        (["CC-BY"], ()),
    ):
        assert tuple(name for name in names if licences.allowed(name, patterns)) == kept, patterns


def test_warning_names_what_is_against_the_purpose_with_its_count_and_nothing_else():
    counts = {"CC-BY-NC-2.0": 7, "CC-BY-2.0": 5, "CC-BY-ND-4.0": 3, "unknown": 2}
    assert licences.warning(counts, "research") is None
    assert licences.warning(counts, "commercial") == (
        "warning: the licences of these photos do not allow run.purpose commercial: 7 CC-BY-NC-2.0 (not for commercial"
        " use); curate.licences leaves them out; it is not known here what those of 2 unknown allow; name the licence"
        " with their source"
    )
    shared = licences.warning(counts, "research", shared=True, unit="pairs")
    assert shared is not None and "3 CC-BY-ND-4.0 (changed photos may not be passed on)" in shared
    assert "NC" not in shared and "unknown" not in shared and "these pairs do not allow" in shared
    assert licences.warning({"CC-BY-2.0": 5}, "commercial", shared=True) is None


def test_attribution_is_author_and_address():
    assert licences.attribution(" Ann\nB. ", "https://a.example/1") == "Ann B., https://a.example/1"
    assert (licences.attribution("", "x"), licences.attribution(None, None)) == ("x", None)


def test_photos_are_counted_by_source_and_licence(tmp_path):
    rows = [frame(f"s/mug/{n}", licence="CC-BY-2.0", attribution=f"author {n}") for n in range(3)]
    rows += [frame("t/mug/0", source="t", attribution="Ann"), frame("t/mug/1", source="t", attribution="Ann")]
    write(tmp_path / "curate", "frames", rows)
    write(tmp_path / "pairs", "triplets", [triplet("s/mug/000", "s/mug/0", "s/mug/2", "s/mug/0")])
    found = licences.of_frames(tmp_path)
    assert [one.plain() for one in found] == [
        {"source": "s", "licence": "CC-BY-2.0", "photos": 3, "attribution": None},
        {"source": "t", "licence": "unknown", "photos": 2, "attribution": "Ann"},
    ]
    assert licences.by_licence(found) == {"CC-BY-2.0": 3, "unknown": 2}
    (used,) = licences.of_frames(tmp_path, triplets=True)
    assert (used.source, used.photos) == ("s", 2)


def test_tables_from_before_the_column_say_what_to_do(tmp_path, monkeypatch):
    spec = tables.spec("frames")
    before = replace(spec, columns={name: column for name, column in spec.columns.items() if name != "licence"})
    row = {name: value for name, value in frame("s/mug/0").items() if name != "licence"}
    with monkeypatch.context() as patch:
        patch.setitem(tables.TABLES, "frames", before)
        write(tmp_path / "curate", "frames", [row])
    with pytest.raises(
        tables.TableError, match=r"column 'licence' is missing; run the stage that writes 'frames' again"
    ):
        licences.of_frames(tmp_path)
