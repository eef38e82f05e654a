"""Recipes: one function an object, which adds primitives to a world.Builder. Axes: y up, the front faces +z."""

from dream_fast.engine.dream_mini.objects import animals, food, places, things

RECIPES = {
    function.__name__.replace("_", " "): function
    for room in (food, animals, places, things)
    for function in room.RECIPES
}
