import pytest

from eval import protocol
from params import UserError


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
    every = protocol_params.model_copy(update={"reference": "all"})
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
    from pipelines import tables

    rows = [row | {"split": "train"} for row in tables.rows(data / "curate", "frames")]
    tables.write(data / "curate", "frames", tables.from_rows("frames", rows))
    with pytest.raises(UserError, match="split: test"):
        protocol.held_out(data)


def test_a_photo_that_is_gone_is_named(data, roots, tmp_path):
    photo = protocol.held_out(data)[0].photos[0]
    (tmp_path / "photos" / photo.path).unlink()
    with pytest.raises(UserError, match=photo.path):
        protocol.read_photo(roots, photo)
