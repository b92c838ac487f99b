"""What docs/toybox.md shows can be pasted: its rows render."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.toybox import world
from pipelines.toybox.rendering import accessories, scenes, sdf, styles
from pipelines.toybox.rendering.march import View
from pipelines.toybox.world import Item, Look, render

TABLES = {"family": sdf.FAMILIES, "scene": scenes.SCENES, "style": styles.STYLES, "accessory": accessories.ACCESSORIES}


@pytest.fixture
def added() -> Iterator[dict[str, str]]:
    """The name of the new row in each table, after running the document's code."""
    before = {name: list(table) for name, table in TABLES.items()}
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/toybox.md").read_text(), re.S)
    try:
        for block in blocks:
            exec(block, {"torch": torch})
        found = {name: [row for row in table if row not in before[name]] for name, table in TABLES.items()}
        assert all(len(rows) == 1 for rows in found.values()), found
        yield {name: rows[0] for name, rows in found.items()}
    finally:
        for name, table in TABLES.items():
            for row in list(table):
                if row not in before[name]:
                    del table[row]


def test_every_row_of_the_document_renders(added: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    subject, view = world.sample_subject(rng, "ball"), View(20.0, 20.0)
    bottle = world.Toy(added["family"], *list(vars(subject).values())[1:])
    looks = [
        Look("grass"),
        Look(added["scene"]),
        Look("grass", style=added["style"]),
        Look("grass", accessory=added["accessory"]),
    ]
    items: list[Item] = [(bottle, view, look) for look in looks]
    drawn = render(items)
    assert len({image.numpy().tobytes() for image in drawn.images}) == len(items)
    assert 0.08 < drawn.masks.float().mean() < 0.6, "the family fills the picture as the others do"
    assert (drawn.masks & ~drawn.subject_masks)[3].sum() > 20, "the accessory can be seen"
    border = torch.cat([drawn.masks[:, [0, -1]].flatten(1), drawn.masks[:, :, [0, -1]].flatten(1)], 1)
    assert not border.any(), "all of it lies inside the unit sphere"
    assert world.caption(bottle, looks[1]).endswith(scenes.SCENES[added["scene"]].phrase)
    assert styles.STYLES[added["style"]].phrase in world.caption(bottle, looks[2])
