"""The embedded worlds, by the name that the commands of the trainings take."""

from train.toybox.lessons.faces import FACES
from train.toybox.lessons.toys import TOYS
from train.toybox.lessons.worlds import World

WORLDS = {world.name: world for world in (TOYS, FACES)}


def world_option(world: World) -> str:
    """What a command needs to be about this world: nothing for toys."""
    return "" if world is TOYS else f" --world {world.name}"
