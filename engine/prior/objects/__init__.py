"""Recipes: one function a thing, which adds primitives to a world.Builder. Axes: y up, the front faces +z."""

from dream_fast.engine.prior.objects import creatures, food, household, mammals, places, things, vehicles

RECIPES = {
    function.__name__.replace("_", " "): function
    for room in (food, mammals, creatures, places, vehicles, household, things)
    for function in room.RECIPES
}
