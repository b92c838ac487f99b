"""Location maps of a pipeline's call, step by step."""

from model.pipeline.maps import equal_steps, maps_over_steps
from tests.world.pipelines import call_with_maps


def test_maps_are_those_of_the_steps_that_recorded_one():
    found = maps_over_steps(call_with_maps([None, 0.25, 0.5, None]))
    assert {step: (t, values.shape, float(values.mean())) for step, (t, values) in found.items()} == {
        1: (899, (2, 3), 0.25),
        2: (898, (2, 3), 0.5),
    }


def test_steps_are_at_equal_distances_from_the_first_to_the_last():
    assert equal_steps(range(3, 24), 5) == [3, 8, 13, 18, 23]
    assert equal_steps([4, 5], 8) == [4, 5]
    assert equal_steps([4, 5, 6], 1) == [6]
