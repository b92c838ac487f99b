from collections import Counter

import pytest

from pipelines.sources import SourceParams, open_source
from pipelines.sources.dreambench import parse_listing, prompt_group
from runtime.errors import UserError

CLASSES = "Classes\n\nsubject_name,class\ncat2,cat\nbear_plushie,stuffed animal\n\n"
OBJECTS = "Prompts\n\nObject Prompts\n\nprompt_list = [\n'a {0} {1} in the snow'.format(unique_token, class_token),\n"
OBJECTS += "'a red {0} {1}'.format(unique_token, class_token)\n]\n\n"
LIVE = "Live Subject Prompts\n\nprompt_list = [\n'a {0} {1} wearing a red hat'.format(unique_token, class_token)\n]\n"


@pytest.fixture
def source(put, params):
    put("dataset/cat2/01.jpg", "dataset/cat2/00.jpg", "dataset/bear_plushie/00.jpg")
    put("dataset/prompts_and_classes.txt", content=CLASSES + OBJECTS + LIVE)
    return open_source(params("dreambench"))


def test_folders_become_subjects(put, source):
    put("captions.csv", content="path,caption\ndataset/cat2/00.jpg,a cat on a sofa\n")
    put("dataset/cat2/.DS_Store", "dataset/cat2/readme.txt", "dataset/.git/x")
    bear, cat = source.subjects()
    assert (bear.subject_id, bear.class_name) == ("s/bear_plushie", "stuffed animal")
    assert [(p.frame_id, p.path, p.caption, p.reject) for p in cat.photos] == [
        ("s/cat2/00", "dataset/cat2/00.jpg", "a cat on a sofa", None),
        ("s/cat2/01", "dataset/cat2/01.jpg", None, None),
        ("s/cat2/readme", "dataset/cat2/readme.txt", None, "not_an_image"),
    ]


def test_photo_in_a_deeper_folder_is_named(put, source):
    put("dataset/cat2/more/02.jpg")
    with pytest.raises(UserError, match=r"more/02.jpg' lies deeper than dataset/<subject>/"):
        list(source.subjects())


def test_objects_and_live_subjects_get_their_own_prompts(source):
    assert [(p.subject_id, p.class_name, p.prompt_id, p.template, p.group) for p in source.prompts()] == [
        ("s/bear_plushie", "stuffed animal", 0, "a {class} in the snow", "scene"),
        ("s/bear_plushie", "stuffed animal", 1, "a red {class}", "property"),
        ("s/cat2", "cat", 0, "a {class} wearing a red hat", "accessory"),
    ]


def test_without_live_prompts_everyone_gets_the_object_prompts(put, source):
    put("dataset/prompts_and_classes.txt", content=CLASSES + OBJECTS)
    assert Counter(p.subject_id for p in source.prompts()) == {"s/bear_plushie": 2, "s/cat2": 2}


def test_comment_of_one_word_names_the_group():
    text = CLASSES + 'Object Prompts\n"a {0} {1}\'s twin",  # identity\n"a {1} in the snow" # see the appendix\n'
    listing = parse_listing(text.replace("\n", "\r\n").splitlines(keepends=True), "f")
    assert [(t.text, t.group) for t in listing.objects] == [
        ("a {class}'s twin", "identity"),
        ("a {class} in the snow", "scene"),
    ]


@pytest.mark.parametrize(
    ("template", "group"),
    [
        ("a {class} on top of a wooden floor", "scene"),
        ("a {class} with the Eiffel Tower in the background", "scene"),
        ("a {class} floating in an ocean of milk", "scene"),
        ("a {class} wearing a black top hat and a monocle", "accessory"),
        ("a {class} in a police outfit", "accessory"),
        ("a cube shaped {class}", "shape"),
        ("a {class} in the shape of a ball", "shape"),
        ("a purple {class}", "property"),
        ("a wet {class}", "property"),
        ("a watercolor of a {class}", "style"),
        ("a {class} in the style of Van Gogh", "style"),
        ("a black and white photo of a {class}", "style"),
        ("a photo of a {class}", "plain"),
        ("a {class}", "plain"),
    ],
)
def test_prompt_groups(template, group):
    assert prompt_group(template) == group


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n" + CLASSES + OBJECTS, "line 1 is 'hello'"),
        (CLASSES.replace("cat2,cat", "cat2"), "line 4 is 'cat2'"),
        (CLASSES.replace("cat2,cat", "cat2,a,b"), "line 4"),
        (CLASSES + "cat2,dog\n", "line 7 lists 'cat2' again"),
        (CLASSES + "Object Prompts\na {0} {1} in the snow\n", "line 8 is 'a {0} {1} in the snow', not a prompt"),
        (CLASSES + "Object Prompts\n'a cat in the snow'\n", "line 8: prompt 'a cat in the snow' must contain {1}"),
        (CLASSES + "Object Prompts\n'a {0} {1} {2}'\n", "line 8"),
        (CLASSES + "Object Prompts\n'a {1} beside a {1}'\n", "line 8"),
        (CLASSES, "holds no object prompt"),
        (OBJECTS, "holds no class"),
        ("", "holds no class"),
    ],
)
def test_malformed_listing_is_named_by_line(content, message):
    with pytest.raises(UserError) as caught:
        parse_listing(content.splitlines(), "some/file.txt")
    assert message in str(caught.value)
    assert str(caught.value).startswith("some/file.txt")


def test_folders_and_listing_must_name_the_same_subjects(put, source):
    put("dataset/dog/00.jpg")
    with pytest.raises(UserError, match="no class for folder 'dog'; add the line 'dog,<class>'"):
        list(source.subjects())
    put("dataset/prompts_and_classes.txt", content=CLASSES + "dog,dog\nvase,vase\n" + OBJECTS)
    with pytest.raises(UserError, match="lists 'vase', which has no folder"):
        list(source.subjects())


def test_real_photographs_and_prompts(real_data):
    root = str(real_data / "dreambench")
    source = open_source(SourceParams(name="db", layout="dreambench", root=root, split="test"))
    found = list(source.subjects())
    assert (len(found), sum(len(s.photos) for s in found), len({s.class_name for s in found})) == (30, 158, 15)
    assert {s.split for s in found} == {"test"}
    prompts = list(source.prompts())
    assert set(Counter(p.subject_id for p in prompts).values()) == {25}
    live = {p.subject_id for p in prompts if p.template == "a {class} wearing pink glasses"}
    assert live == {f"db/{name}" for name in ("cat", "cat2", *(f"dog{n}" for n in ("", 2, 3, 5, 6, 7, 8)))}
    of_a_cat = Counter(p.group for p in prompts if p.subject_id == "db/cat")
    of_a_can = Counter(p.group for p in prompts if p.subject_id == "db/can")
    assert of_a_cat == {"scene": 10, "accessory": 10, "property": 4, "shape": 1}
    assert of_a_can == {"scene": 20, "property": 4, "shape": 1}
