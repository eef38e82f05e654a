"""Recipes: a function for each thing, which adds primitives to a `scenes.Builder`. Axes: y up, the front faces +z."""

from dream_fast.engine.dream_mini.objects import creatures, food, household, mammals, places, things, vehicles

RECIPES = {
    function.__name__.replace("_", " "): function
    for module in (food, mammals, creatures, places, vehicles, household, things)
    for function in module.RECIPES
}
