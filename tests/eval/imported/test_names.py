import pytest

from eval.imported.names import MOST_SEED, Misnamed, matching, names_in, seed_of, split_name, words
from eval.protocol import protocol

DUCK, MUG = "bench/duck", "bench/mug"


@pytest.mark.parametrize(
    "written",
    [
        "a duck on a beach",
        "a_duck_on_a_beach",
        "a-duck-on-a-beach",
        "A Duck, on a beach.",
        "a__duck on_a  beach",
        "0",
        "000",
        " 0 ",
    ],
)
def test_a_prompt_is_its_text_in_any_spelling_of_the_spaces_or_its_number(names, written):
    assert names.prompt(DUCK, written).prompt_id == 0
    assert names.prompt(DUCK, written).text == "a duck on a beach"


def test_the_reconstruction_prompt_is_one_too(names):
    for written in ("a photo of a mug", "-1"):
        found = names.prompt(MUG, written)
        assert (found.group, found.prompt_id, found.wanted) == ("reconstruction", -1, False)


def test_a_prompt_of_another_subject_or_none_is_refused_with_the_nearest(names):
    with pytest.raises(Misnamed, match=r"asks for 'a mug on a beach', which is no prompt of bench/duck"):
        names.prompt(DUCK, "a mug on a beach")
    with pytest.raises(Misnamed, match=r"did you mean 'a duck on a beach'\?"):
        names.prompt(DUCK, "a duck on the beach")
    with pytest.raises(Misnamed, match="no prompt of bench/duck"):
        names.prompt(DUCK, "")
    with pytest.raises(Misnamed, match=r"asks for prompt 3 of bench/duck, whose prompts have the numbers -1 to 2"):
        names.prompt(DUCK, "3")


def test_a_pseudo_word_is_left_out_where_it_is_told_of(names, data, protocol_params):
    with pytest.raises(Misnamed, match=r"--token sks leaves out that word"):
        names.prompt(DUCK, "a sks duck on a beach")
    subjects = protocol.held_out(data)
    usable = {photo.frame_id for subject in subjects for photo in subject.photos}
    told = names_in(subjects, protocol.prompts_by_subject(data), protocol_params, usable, "<new 1>")
    assert told.prompt(DUCK, "a <new 1> duck on a beach").prompt_id == 0
    assert told.prompt(DUCK, "a duck on a beach").prompt_id == 0
    assert words("newest ducks", "new") == "newest ducks", "whole words only"


def test_prompts_that_differ_in_punctuation_only_have_numbers_alone(data, protocol_params):
    rows = protocol.prompts_by_subject(data)
    rows[DUCK] += [rows[DUCK][0] | {"prompt_id": 7, "template": "a {class}, on a beach"}]
    subjects = protocol.held_out(data)
    usable = {photo.frame_id for subject in subjects for photo in subject.photos}
    found = names_in(subjects, rows, protocol_params, usable)
    with pytest.raises(Misnamed, match="fits the prompts 0 and 7 of bench/duck alike"):
        found.prompt(DUCK, "a duck on a beach")
    assert found.prompt(DUCK, "7").text == "a duck, on a beach"
    with pytest.raises(Misnamed, match="have the numbers -1 to 2, 7"):
        found.prompt(DUCK, "5")


def test_own_prompts_are_known_where_the_protocol_asks_for_them(data, protocol_params):
    params = protocol_params.model_copy(update={"prompt_set": "groups", "prompts": 8})
    subjects = protocol.held_out(data)
    usable = {photo.frame_id for subject in subjects for photo in subject.photos}
    found = names_in(subjects, protocol.prompts_by_subject(data), params, usable)
    assert found.prompt(MUG, "a_pencil_sketch_of_a_mug").group == "style"
    assert sum(prompt.wanted for prompt in found.prompts[MUG]) == 8


def test_a_subject_is_its_id_or_the_last_part_of_it(names):
    assert names.subject("duck") == names.subject("bench/duck") == names.subject(" duck/ ") == DUCK
    with pytest.raises(Misnamed, match=r"is of 'dukc', which is no held-out subject \(did you mean 'duck'\?\)"):
        names.subject("dukc")
    with pytest.raises(Misnamed, match="no held-out subject"):
        names.subject("run1/duck")
    assert matching("duck", ["a/duck", "b/duck"]) == ["a/duck", "b/duck"]
    assert matching("a/duck", ["a/duck", "b/a/duck"]) == ["a/duck"], "the id itself comes first"
    assert matching("caf\u0065\u0301", ["a/caf\u00e9"]) == ["a/caf\u00e9"], "accents match whether composed or not"


def test_a_subject_without_a_photo_to_compare_with_is_known_and_not_scored(names):
    assert names.subject("ring") == "bench/ring"
    assert list(names.dropped) == ["bench/ring"]
    assert "bench/ring" not in names.subjects


def test_a_file_name_is_split_at_its_last_underscore():
    assert split_name("a_duck_on_a_beach_12") == ("a_duck_on_a_beach", "12")
    assert split_name("7_0") == ("7", "0")
    for stem in ("a duck", "a_duck", "12", "_12", "a duck_1x", "a duck_-1", "a duck_²"):
        with pytest.raises(Misnamed, match="does not end in _<seed>"):
            split_name(stem)


@pytest.mark.parametrize("written", ["", "-1", "1.0", "x", "9" * 40, str(MOST_SEED + 1), "٣"])
def test_a_seed_is_a_whole_number_that_the_table_holds(written):
    assert seed_of(str(MOST_SEED)) == MOST_SEED
    with pytest.raises(Misnamed, match="no whole number from 0"):
        seed_of(written)
