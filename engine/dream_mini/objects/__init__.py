"""Recipes: a function per object adds its primitives to a `scenes.Builder`. Axes: y up, the front faces +z."""

from dream_fast.engine.dream_mini.objects import animals, food, places, things

RECIPES = {
    function.__name__.replace("_", " "): function
    for module in (food, animals, places, things)
    for function in module.RECIPES
}
