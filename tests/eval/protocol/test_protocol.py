import re
from dataclasses import replace
from itertools import pairwise

import pytest

from eval.protocol import prompts as own
from eval.protocol import protocol
from pipelines import tables
from pipelines.photos.roots import SourceParams
from pipelines.sources import open_source
from runtime.errors import UserError


def ids(rows):
    return [row["prompt_id"] for row in rows]


def prompts(*groups):
    return [{"prompt_id": i, "group": g, "template": f"a {{class}} {i}"} for i, g in enumerate(groups)]


def test_seed_is_a_function_of_seed_subject_prompt_and_index_alone():
    assert protocol.seed_of(0, "bench/duck", 3, 1) == 1512733155
    others = {
        protocol.seed_of(*a)
        for a in ((1, "bench/duck", 3, 1), (0, "b", 3, 1), (0, "bench/duck", 4, 1), (0, "bench/duck", 3, 0))
    }
    assert len(others | {1512733155}) == 5
    assert all(0 <= seed < 2**32 for seed in others)


def test_a_prompt_limit_is_spread_over_the_groups_and_evenly_inside_each():
    rows = prompts(*["scene"] * 8, *["style"] * 4, "shape")
    assert ids(protocol.spread(rows, 5)) == [0, 4, 8, 10, 12]
    assert ids(protocol.spread(rows, None)) == list(range(13))
    assert ids(protocol.spread(rows, 99)) == list(range(13))
    assert protocol.spread(rows, 0) == []


def test_first_reference_is_the_first_photo_by_id_with_a_usable_mask(data, protocol_params):
    found = {
        s.subject_id: [p.frame_id for p in protocol.references(s, protocol_params)] for s in protocol.held_out(data)
    }
    assert found == {"bench/duck": ["bench/duck/00"], "bench/mug": ["bench/mug/01"], "bench/ring": []}


def test_all_references_and_a_fixed_list(data, protocol_params):
    mug = protocol.held_out(data)[1]
    for rule in ("all", "leave_one_out"):
        every = protocol_params.model_copy(update={"reference": rule})
        assert [p.frame_id[-2:] for p in protocol.references(mug, every)] == ["01", "02", "03"]
    fixed = protocol_params.model_copy(update={"references": {"bench/mug": "bench/mug/02"}})
    assert [p.frame_id[-2:] for p in protocol.references(mug, fixed)] == ["02"]
    unusable = protocol_params.model_copy(update={"references": {"bench/mug": "bench/mug/00"}})
    with pytest.raises(UserError, match="bench/mug/00"):
        protocol.references(mug, unusable)


def test_jobs_are_the_reconstruction_prompt_and_every_prompt_with_every_reference(data, protocol_params):
    duck = protocol.held_out(data)[0]
    params = protocol_params.model_copy(update={"reference": "all", "images": 2})
    made = protocol.jobs(duck, protocol.prompts_by_subject(data)["bench/duck"], params)
    assert len(made) == 4 * (2 + 3 * 2)
    assert {(j.prompt_id, j.group, j.prompt) for j in made if j.prompt_id < 1} == {
        (-1, "reconstruction", "a photo of a duck"),
        (0, "scene", "a duck on a beach"),
    }
    assert len({(j.prompt_id, j.index) for j in made}) == len({j.seed for j in made}) == len(made)
    assert {j.reference.frame_id for j in made} == {f"bench/duck/0{n}" for n in range(4)}


def test_a_world_without_held_out_photos_says_so(tmp_path, data):
    rows = [row | {"split": "train"} for row in tables.rows(data / "curate", "frames")]
    tables.write(data / "curate", "frames", tables.from_rows("frames", rows))
    with pytest.raises(UserError, match="split: test"):
        protocol.held_out(data)


def test_a_photo_that_is_gone_is_named(data, roots, tmp_path):
    photo = protocol.held_out(data)[0].photos[0]
    (tmp_path / "photos" / photo.path).unlink()
    with pytest.raises(UserError, match=photo.path):
        protocol.read_photo(roots, photo)


NOUNS = [
    *("backpack", "boot", "bowl", "can", "candle", "cartoon", "cat", "clock", "dog", "glasses"),
    *("sneaker", "stuffed animal", "teapot", "toy", "vase"),
]


def test_each_class_has_25_prompts_in_each_of_the_four_groups_and_no_prompt_twice():
    for noun in NOUNS:
        rows = list(own.of_class(noun))
        assert tables.count_by(row["group"] for row in rows) == dict.fromkeys(
            ["accessory", "scene", "shape", "style"], 25
        )
        assert len({row["template"] for row in rows}) == len({row["prompt_id"] for row in rows}) == 100


def test_live_subjects_and_objects_share_ids_only_of_prompts_for_both():
    live, thing = ({row["prompt_id"]: row["template"] for row in own.of_class(noun)} for noun in ("cat", "clock"))
    shared = live.keys() & thing.keys()
    assert len(shared) == 65
    assert all(live[number] == thing[number] for number in shared)
    assert "a {class} sleeping on a sofa" in set(live.values()) - set(thing.values())
    assert "a {class} in a glass display case" in set(thing.values()) - set(live.values())


def test_prompts_hold_the_class_once_and_no_noun_of_dreambench_that_a_pseudo_word_could_go_to():
    templates = [t for lists in own.prompt_file().groups.values() for some in lists.values() for t in some]
    templates += [row["template"] for row in own.of_people()]
    assert all(re.findall(r"[{].*?[}]", template) == ["{class}"] for template in templates)
    assert all(sorted(re.findall(r"[{].*?[}]", template)) == ["{a}", "{b}"] for template in own.of_pairs())
    for noun in NOUNS:
        pattern = re.compile(rf"\b{noun}\b")
        assert not [template for template in (*templates, *own.of_pairs()) if pattern.search(template)], noun


def test_a_prompt_file_with_an_unknown_key_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "prompts.yaml").write_text("live: []\ngroups: {style: {never: [a]}}\npairs: []\n")
    monkeypatch.setattr(own, "FILE", tmp_path / "prompts.yaml")
    own.prompt_file.cache_clear()
    with pytest.raises(UserError, match=r"prompts.yaml is malformed .*never") as error:
        own.prompt_file()
    assert "\n" not in str(error.value)
    own.prompt_file.cache_clear()


@pytest.mark.parametrize(
    ("groups", "pairs", "message"),
    [
        ("{photo: {any: ['a {class}']}}", "[]", "group 'photo' has a name that is reserved"),
        ("{pair: {any: ['a {class}']}}", "[]", "group 'pair'"),
        ("{style: {any: ['a {clas}']}}", "[]", "prompt 'a {clas}' must have {class}"),
        ("{style: {any: ['a toy']}}", "[]", "prompt 'a toy' must have {class}"),
        ("{}", "['{a} and {b} and {c}']", "must have {a} and {b} and no other place"),
    ],
)
def test_prompts_with_taken_names_or_wrong_places_are_one_sentence(tmp_path, monkeypatch, groups, pairs, message):
    (tmp_path / "prompts.yaml").write_text(f"live: []\ngroups: {groups}\npeople: {{}}\npairs: {pairs}\n")
    monkeypatch.setattr(own, "FILE", tmp_path / "prompts.yaml")
    own.prompt_file.cache_clear()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        own.prompt_file()
    assert "\n" not in str(error.value)
    own.prompt_file.cache_clear()


def test_prompt_set_groups_takes_the_place_of_the_sources_prompts(data, protocol_params):
    duck = protocol.held_out(data)[0]
    rows = protocol.prompts_by_subject(data)["bench/duck"]
    grouped = protocol_params.model_copy(update={"prompt_set": "groups", "prompts": 8})
    made = protocol.jobs(duck, rows, grouped)
    assert [job.group for job in made] == ["reconstruction"] * 2 + [
        g for g in ("style", "shape", "scene", "accessory") for _ in range(2)
    ]
    assert made[2].prompt == "a watercolor painting of a duck"
    assert not {job.prompt for job in made} & {row["template"].replace("{class}", "duck") for row in rows}


def test_prompt_set_people_has_as_many_prompts_in_each_of_six_groups(data, protocol_params):
    duck = replace(protocol.held_out(data)[0], class_name="woman")
    made = protocol.jobs(duck, [], protocol_params.model_copy(update={"prompt_set": "people"}))[2:]
    groups = [job.group for job in made]
    assert list(dict.fromkeys(groups)) == ["style", "scene", "accessory", "hair", "expression", "job"]
    assert {groups.count(group) for group in groups} == {8}
    assert len({job.prompt for job in made}) == len({job.prompt_id for job in made}) == 48
    assert all("woman" in job.prompt.split() or "woman," in job.prompt for job in made)
    others = {row["prompt_id"] for row in own.of_class("woman")} | {protocol.PAIR_ID, protocol.RECONSTRUCTION_ID}
    assert not others & {job.prompt_id for job in made}
    assert max(job.prompt_id for job in made) < protocol.PAIR_ID


def crowd(data, count):
    """Held-out subjects of alternating class nouns, all with a usable mask."""
    duck = protocol.held_out(data)[0]
    return [replace(duck, subject_id=f"bench/{i}", class_name=("duck", "mug", "ring")[i % 3]) for i in range(count)]


def test_pairs_are_of_different_nouns_and_spread_over_the_subjects(data, protocol_params):
    subjects = crowd(data, 9)
    chosen = [protocol.pairs(subjects, protocol_params.model_copy(update={"pairs": n})) for n in range(10)]
    assert chosen[0] == []
    assert all(a.class_name != b.class_name for a, b in chosen[9])
    assert len({protocol.pair_id(pair) for pair in chosen[9]}) == 9
    assert all(more[: len(fewer)] == fewer for fewer, more in pairwise(chosen))
    uses = tables.count_by(subject.subject_id for pair in chosen[9] for subject in pair)
    assert set(uses.values()) == {2}
    assert len(uses) == 9


def test_more_pairs_than_there_are_is_an_error(data, protocol_params):
    subjects = protocol.held_out(data)  # the ring has no usable mask
    assert len(protocol.pairs(subjects, protocol_params.model_copy(update={"pairs": 1}))) == 1
    with pytest.raises(UserError, match="form 1 pairs"):
        protocol.pairs(subjects, protocol_params.model_copy(update={"pairs": 2}))


def test_pictures_of_pairs_share_prompt_and_seed_and_an_id_is_one_text_of_a_subject(data, protocol_params):
    params = protocol_params.model_copy(update={"pairs": 9, "images": 2})
    chosen = protocol.pairs(crowd(data, 9), params)
    keys, texts = set(), {}
    for pair, pictures in zip(chosen, protocol.pair_jobs(chosen, params), strict=True):
        assert len(pictures) == 2 * len(own.of_pairs())
        for one, other in pictures:
            assert replace(one, reference=other.reference) == other
            assert (one.reference.frame_id, other.reference.frame_id) == ("bench/duck/00",) * 2
            assert all(subject.class_name in one.prompt for subject in pair)
            for subject in pair:
                keys.add((subject.subject_id, one.prompt_id, one.index))
                assert texts.setdefault((subject.subject_id, one.prompt_id), one.prompt) == one.prompt
    assert len(keys) == 2 * 9 * 2 * len(own.of_pairs())
    assert {index for *_, index in keys} == {0, 1}


def test_protocol_id_changes_with_subjects_photos_prompts_seeds_rule_and_side_alone(data, protocol_params):
    subjects = protocol.held_out(data)
    rows = protocol.prompts_by_subject(data)

    def named(subjects=subjects, rows=rows, rule="first", side=64, **override):
        params = protocol_params.model_copy(update=override)
        made = [job for s in subjects for job in protocol.jobs(s, rows.get(s.subject_id, []), params)]
        return protocol.protocol_id(subjects, made, rule, side)

    original = named()
    assert re.fullmatch("[0-9a-f]{16}", original)
    assert named(subjects[::-1]) == original
    assert named(prompts=99) == original  # as many as there are
    another = replace(subjects[1], photos=(replace(subjects[1].photos[0], sha256="1" * 64), *subjects[1].photos[1:]))
    found = {
        original,
        named(subjects[:1]),
        named([subjects[0], another]),
        named([replace(subjects[0], class_name="bird"), subjects[1]]),
        named(rows={}),
        named(rule="leave_one_out"),
        named(side=512),
        named(seed=1),
        named(images=2),
        named(reconstructions=3),
        named(reconstruction="the {class}"),
        named(prompt_set="groups"),
        named(prompt_set="people"),
        named(references={"bench/duck": "bench/duck/02"}),
    }
    assert len(found) == 14


def test_protocol_id_knows_no_masks(data, protocol_params):
    subject = protocol.held_out(data)[0]
    other = replace(subject, photos=tuple(replace(p, mask={**p.mask, "rle": b"other"}) for p in subject.photos))
    ids = {protocol.protocol_id([s], protocol.jobs(s, [], protocol_params), "first", 8) for s in (subject, other)}
    assert len(ids) == 1


def test_dreambench_as_published_is_3000_pictures_of_30_subjects(real_data, protocol_params):
    source = open_source(
        SourceParams(name="dreambench", layout="dreambench", root=str(real_data / "dreambench"), split="test")
    )
    rows: dict[str, list] = {}
    for prompt in source.prompts():
        rows.setdefault(prompt.subject_id, []).append(vars(prompt))
    mask = {"quality": "ok", "rle": b""}
    subjects = [
        protocol.HeldOutSubject(
            s.subject_id,
            s.class_name,
            tuple(protocol.HeldOutPhoto(p.frame_id, s.source, p.path, "", mask) for p in s.photos),
        )
        for s in source.subjects()
    ]
    params = protocol_params.model_copy(update={"images": 4, "reconstructions": 4})
    made = {s.subject_id: protocol.jobs(s, rows[s.subject_id], params) for s in subjects}
    assert (len(subjects), sum(len(s.photos) for s in subjects)) == (30, 158)
    assert sum(len(jobs) for jobs in made.values()) == 30 * (25 * 4 + 4)
    live = [name for name, jobs in made.items() if any("in a chef outfit" in job.prompt for job in jobs)]
    assert len(live) == 9
    grouped = params.model_copy(update={"prompt_set": "groups"})
    assert all(len(protocol.jobs(s, [], grouped)) == 4 * 25 * 4 + 4 for s in subjects)
    assert len({seed for jobs in made.values() for seed in [job.seed for job in jobs]}) == 3120
