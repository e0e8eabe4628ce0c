"""The recipe: all that a run is made from. Nothing in here imports torch."""

from linchain_cli.recipe.loading import load_recipe, shipped_recipes
from linchain_cli.recipe.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateFactors,
    ModelConfig,
    Recipe,
    SourceConfig,
    TemplateConfig,
    TrainingConfig,
    json_schema,
)

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "EvaluationConfig",
    "LearningRateFactors",
    "ModelConfig",
    "Recipe",
    "SourceConfig",
    "TemplateConfig",
    "TrainingConfig",
    "json_schema",
    "load_recipe",
    "shipped_recipes",
]
