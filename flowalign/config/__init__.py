"""What a recipe may say: typed sections, read from YAML and checked before anything loads.

An algorithm's class is found by its name when it is needed. What stands here is imported when it is first used.
"""

from typing import TYPE_CHECKING

from rewards.lazy import exports

if TYPE_CHECKING:
    from flowalign.config.recipe import Recipe, bundled_recipes, dump_recipe, load_recipe, recipe_from_dict
    from flowalign.config.rewards import Combine, RewardSettings, Shaping
    from flowalign.config.sections import Collect, Evaluation, Guard, Lora, Model, Rollout, Run, Sampler, Train

_FROM = {
    "recipe": ("Recipe", "bundled_recipes", "dump_recipe", "load_recipe", "recipe_from_dict"),
    "rewards": ("Combine", "RewardSettings", "Shaping"),
    "sections": ("Collect", "Evaluation", "Guard", "Lora", "Model", "Rollout", "Run", "Sampler", "Train"),
}

__all__ = [
    "Collect",
    "Combine",
    "Evaluation",
    "Guard",
    "Lora",
    "Model",
    "Recipe",
    "RewardSettings",
    "Rollout",
    "Run",
    "Sampler",
    "Shaping",
    "Train",
    "bundled_recipes",
    "dump_recipe",
    "load_recipe",
    "recipe_from_dict",
]

__getattr__ = exports(__name__, _FROM)
